"""The Pixel-GAN's critic: a real SAM of random weights, heads by value, and what is computed again."""

from pathlib import Path
from shutil import copytree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.backbones.roles import keyed_init
from core.config import UserError, compose, resolve, run_id
from core.critics.pixel import VIT_H, PixelCritic, SamFeatures
from tests import worlds


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.vision(tmp_path_factory.mktemp("sam") / "sam", "sam")


def pixels(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_levels_are_the_hidden_states_of_sams_encoder(sam: Path) -> None:
    """Those of transformers' own forward at the size that it allows; layers beyond the last one are not built."""
    from transformers import SamModel

    features = SamFeatures(str(sam), [1, 3])
    assert len(features.network.layers) == 3 and features.channels == [16, 16]
    found = features(pixels(64))
    images = ((pixels(64) + 1) / 2 - features.mean) / features.std
    encoder = SamModel.from_pretrained(str(sam)).vision_encoder
    states = encoder(images, output_hidden_states=True).hidden_states  # the first ones are before any layer
    for level, layer in zip(found, (1, 3), strict=True):
        assert level.shape == (2, 16, 4, 4)
        torch.testing.assert_close(level, states[layer - len(encoder.layers) - 1].permute(0, 3, 1, 2))


def test_other_sizes_have_other_positions(sam: Path) -> None:
    """A crop of 32 pixels is 2 x 2 patches, whose positions are those of the whole, resized."""
    features = SamFeatures(str(sam), [3])
    assert [tuple(features(pixels(side))[0].shape[2:]) for side in (16, 32, 40, 128)] == [
        (1, 1),
        (2, 2),
        (2, 2),
        (8, 8),
    ]
    held = features.network.pos_embed
    assert torch.equal(features._positions(4), held)
    torch.testing.assert_close(features._positions(2).mean(), held.mean(), rtol=0.3, atol=0.05)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_layers_that_are_computed_again_give_the_same_gradient(sam: Path, dtype: torch.dtype | None) -> None:
    def gradient(again: bool) -> tuple[Tensor, int]:
        features, images, kept = SamFeatures(str(sam), [1, 4], dtype, lambda: again), pixels(64).requires_grad_(), []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sum(level.square().sum() for level in features(images))
        held = sum(kept)
        loss.backward()
        assert all(parameter.grad is None for parameter in features.network.parameters())
        return images.grad, held

    (plain, kept), (again, held) = gradient(False), gradient(True)
    assert torch.equal(plain, again) and plain.abs().sum() > 0 and held < 0.7 * kept


def test_heads_by_value() -> None:
    """Three halvings and a convolution, each with its norm and SiLU, then the mean of all positions to one number."""
    with keyed_init("critic"):
        critic = PixelCritic([5, 3], 32)
    one = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(2), requires_grad=True)
    maps = [torch.randn(2, 5, 16, 16, generator=torch.Generator().manual_seed(1)), one]
    logits = critic(maps)
    assert logits.shape == (2, 2) and sum(p.numel() for p in critic.parameters()) > 0
    state, x = dict(critic[0].named_parameters()), maps[0]
    for block, stride in (("halvings.0", 2), ("halvings.1", 2), ("halvings.2", 2), ("last", 1)):
        x = F.conv2d(x, state[f"{block}.0.weight"], state[f"{block}.0.bias"], stride, 1)
        groups = x.view(2, 4, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        x = groups.view_as(x) * state[f"{block}.1.weight"].view(1, -1, 1, 1) + state[f"{block}.1.bias"].view(
            1, -1, 1, 1
        )
        x = x * torch.sigmoid(x)
    assert x.shape == (2, 32, 2, 2)
    expected = x.mean((2, 3)) @ state["linear.weight"].mT + state["linear.bias"]
    torch.testing.assert_close(logits[:, :1], expected, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(logits[:, 1].sum(), one)[0].abs().min() > 0, "a norm of one number would be constant"
    published = PixelCritic([VIT_H["hidden_size"]], 256)
    assert (
        sum(p.numel() for p in published.parameters()) == (1280 + 256 + 256) * 256 * 16 + 256 * 256 * 9 + 12 * 256 + 257
    )


def test_wrong_folders_are_told_in_one_line(tmp_path: Path, sam: Path) -> None:
    cut, other = copytree(sam, tmp_path / "cut"), worlds.vision(tmp_path / "dino", "dinov2")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    lacks = copytree(sam, tmp_path / "lacks")
    (lacks / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    for path, layers, line in (
        (None, [1], "method.gan=sam needs method.sam_path: a folder of SAM"),
        (str(tmp_path), [1], "no config.json there; give a folder in transformers"),
        (str(other), [1], "is a dinov2; allowed: sam, sam_vision_model"),
        (str(sam), [5], "method.sam_layers: layer 5 is not in method.sam_path=.*; allowed: 1 to 4"),
        (str(cut), [1], "cannot be loaded"),
        (str(lacks), [1], "lacks [0-9]+ weights of SAM's image encoder: vision_encoder"),
    ):
        with pytest.raises(UserError, match=line) as error:
            SamFeatures(path, layers)
        assert "\n" not in str(error.value)


def test_flash_dmd_trains_against_a_users_sam_whose_content_is_part_of_the_run(tmp_path: Path, sam: Path) -> None:
    def settings(folder: Path) -> list[str]:
        own = ["method.gan=sam", f"method.sam_path={folder}", "method.sam_layers=[2,4]", "data.path=random:noise"]
        return [*own, "method.critic_crop=32"]

    trained = worlds.trainer(tmp_path, settings(sam), experiment="flash_dmd/tiny")
    before = worlds.parameters(trained)
    trained._iteration()
    after = worlds.parameters(trained)
    moved = {name.partition("/")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"student", "fake_score", "critic"}
    assert all(torch.isfinite(value).all() for value in after.values())
    same, other = copytree(sam, tmp_path / "same"), worlds.vision(tmp_path / "other", "vit")
    ids = [run_id(resolve(compose("flash_dmd/tiny", settings(folder)))) for folder in (sam, same, other)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("family", ["unet", "flux2"])
def test_a_checkpointed_decoder_gives_the_same_gradient_and_keeps_less(tmp_path: Path, family: str) -> None:
    def gradient(checkpointing: bool) -> tuple[Tensor, int]:
        backbone, kept = worlds.backbone(tmp_path, family=family), []
        backbone.compute_dtype = torch.bfloat16
        if checkpointing:
            backbone.enable_activation_checkpointing()
        shape = (2, *backbone.latent_shape)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = backbone.training_pixels(latents).square().sum()
        held = sum(kept)
        loss.backward()
        return latents.grad, held

    (plain, kept), (again, held) = gradient(False), gradient(True)
    assert torch.equal(plain, again) and held < 0.5 * kept
