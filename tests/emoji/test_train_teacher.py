"""The teachers' recipe: a stopped training ends with the same weights; the rate falls over the last quarter."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from core.data.shards import Example
from experiments.emoji.recipes.train_teacher import RECIPES, Trainer
from experiments.emoji.recipes.train_vae import build_vae

CAPTIONS = ["red apple", "blue heart on a white background", "grinning face", "flag"]


@pytest.fixture
def vae() -> AutoencoderKL:
    return build_vae(16)


def trainer(
    folder: Path, vae: AutoencoderKL, family: str, images: int = 16, init: Path | None = None, seen: int = 0
) -> Trainer:
    """A training in ``folder``; all of one test have one tokenizer, whose merges of equal count are in any order."""
    folder.mkdir(exist_ok=True)
    image = np.zeros((64, 64, 3), np.uint8)
    meta = {"group": "food & drink", "subgroup": "food-fruit"}
    examples = [Example(key=str(i), image=image, caption=text, meta=meta) for i, text in enumerate(CAPTIONS * 4)]
    args = Namespace(out=folder, lr=1e-3, images=images, batch_size=2, compile=False, bf16=False, init=init, seen=seen)
    return Trainer(args, RECIPES[family](examples, folder.parent / "tokenizer"), vae)


@pytest.mark.parametrize("family", ["sd", "flux2"])
def test_a_stopped_training_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, vae: AutoencoderKL, family: str
) -> None:
    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    def go_on(folder: Path, updates: int) -> Trainer:
        trained = trainer(folder, vae, family)
        own = trained.recipe.latents(latents, vae)
        ids = trained.recipe.ids(CAPTIONS)
        for _ in range(updates):
            trained.update(own, ids)
        trained.save()
        return trained

    whole = go_on(tmp_path / "whole", 3)
    go_on(tmp_path / "cut", 1)
    resumed = go_on(tmp_path / "cut", 2)
    assert resumed.images == whole.images == 6
    for name, value in resumed.ema.state_dict().items():
        torch.testing.assert_close(value, whole.ema.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["sd", "flux2"])
def test_a_training_goes_on_from_the_weights_of_a_milestone(tmp_path: Path, vae: AutoencoderKL, family: str) -> None:
    first = trainer(tmp_path / "first", vae, family)
    first.recipe.latents(torch.randn(4, 16, 8, 8), vae)  # their statistics are part of a pipeline
    with torch.no_grad():
        for parameter in first.ema.parameters():
            parameter.add_(0.25)
    first.export(tmp_path / "milestone")
    later = trainer(tmp_path / "later", vae, family, init=tmp_path / "milestone", seen=8)
    assert (later.images, later.step) == (8, 0)
    for networks in (later.networks, later.ema):
        for name, value in networks.state_dict().items():
            torch.testing.assert_close(value, first.ema.state_dict()[name].half().float(), rtol=0, atol=0)


def test_the_rate_is_constant_and_falls_over_the_last_quarter(tmp_path: Path, vae: AutoencoderKL) -> None:
    trained, seen = trainer(tmp_path, vae, "sd", images=1000), []
    trained.optimizer.step = seen.append
    latents, ids = torch.zeros(4, 16, 8, 8), trained.recipe.ids(CAPTIONS)
    for images in (0, 500, 750, 812.5, 1000):
        trained.images = int(images)
        trained.update(latents, ids)
    assert seen == pytest.approx([0.0, 1e-3, 1e-3, 1e-3 * (1 - np.sqrt(0.248)), 0.0])
