"""Critics on decoded images: a real DINOv2 and a real DINO of random weights, and the embedded network."""

from pathlib import Path
from shutil import copytree

import pytest
import torch

from core.backbones.roles import keyed_init
from core.config import UserError, compose, resolve, run_id
from core.critics.image import DinoFeatures, EffnetFeatures, ImageCritic
from tests import worlds


@pytest.mark.parametrize(("kind", "side"), [("dinov2", 5), ("vit", 8)])
def test_dino_features_are_the_patch_tokens_of_three_layers_as_maps(tmp_path: Path, kind: str, side: int) -> None:
    features = DinoFeatures(str(worlds.vision(tmp_path / kind, kind)))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = features(pixels)
    assert [tuple(found.shape) for found in maps] == [(2, 16, side, side)] * 3 and features.layers == [2, 4, 6]
    assert features.channels == [16] * 3
    images = (pixels + 1) / 2
    images = (images - features.mean) / features.std
    if kind == "vit":  # its patches divide the image: nothing is resized, and tokens are row by row after the class
        states = features.network(images, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        assert torch.allclose(maps[1][0, :, 2, 3], states[4][0, 1 + 2 * 8 + 3], atol=1e-5)


def test_the_gradient_reaches_the_pixels_and_not_the_network() -> None:
    features = EffnetFeatures()
    with keyed_init("critic"):
        critic = ImageCritic(features.channels, 8)
    pixels = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    maps = features(pixels)
    assert [found.shape[2] for found in maps] == [8, 4, 2]
    logits = critic(maps)
    assert logits.shape == (2, 64 + 16 + 4)
    logits.sum().backward()
    assert pixels.grad.abs().sum() > 0 and all(p.grad is None for p in features.network.parameters())


def test_wrong_folders_are_told_in_one_line(tmp_path: Path) -> None:
    for path, line in (
        (None, "method.gan=dino needs method.dino_path"),
        (str(tmp_path), "no config.json there"),
        (str(worlds.vision(tmp_path / "clip", "clip")), "is a clip_vision_model; allowed: vit \\(DINO\\), dinov2"),
    ):
        with pytest.raises(UserError, match=line):
            DinoFeatures(path)


def test_dmd2_trains_against_a_users_dino_whose_content_is_part_of_the_run(tmp_path: Path) -> None:
    def settings(folder: Path) -> list[str]:
        return ["method.gan=dino", f"method.dino_path={folder}", "method.ttur=1", "data.path=random:noise"]

    first = worlds.vision(tmp_path / "dino", "dinov2")
    trained = worlds.trainer(tmp_path, settings(first), experiment="dmd2/tiny")
    before = worlds.parameters(trained)
    trained._iteration()
    after = worlds.parameters(trained)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert {name.partition("/")[0] for name in moved} == {"student", "fake_score", "critic"}
    assert all(torch.isfinite(value).all() for value in after.values())
    same, other = copytree(first, tmp_path / "same"), worlds.vision(tmp_path / "other", "vit")
    ids = [run_id(resolve(compose("dmd2/tiny", settings(folder)))) for folder in (first, same, other)]
    assert ids[0] == ids[1] != ids[2]
