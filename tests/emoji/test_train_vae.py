"""The autoencoder's recipe: widening changes no picture, and an interrupted training ends with the same weights."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from core.data.shards import open_dataset
from experiments.emoji.recipes.train_vae import Trainer, psnr, training_view, validation_images, widened

ASSETS = Path(__file__).parents[2] / "experiments" / "emoji" / "assets"


def test_a_widened_autoencoder_reconstructs_what_the_narrow_one_does() -> None:
    narrow = AutoencoderKL.from_pretrained(ASSETS / "emoji-sd-v1" / "vae")
    images = validation_images(open_dataset(ASSETS / "emoji-64-v1", "heldout"), 4)
    torch.manual_seed(0)
    wide = widened(narrow, 16)
    assert wide.config.latent_channels == 16
    np.testing.assert_allclose(psnr(wide, images), psnr(narrow, images), rtol=1e-5)
    x = torch.rand(2, 3, 64, 64)
    ours, theirs = wide.encode(x).latent_dist, narrow.encode(x).latent_dist
    torch.testing.assert_close(ours.mean[:, :8], theirs.mean)
    torch.testing.assert_close(ours.logvar[:, :8], theirs.logvar)


def test_a_stopped_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    args = {"phase": "joint", "init": None, "lr": 1e-3, "images": 8, "latent_channels": 4}
    images = torch.rand(4, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    trainer = Trainer(Namespace(**args, out=whole))
    for x in images:
        trainer.update(x)
    first = Trainer(Namespace(**args, out=stopped))
    for x in images[:2]:
        first.update(x)
    first.save()
    second = Trainer(Namespace(**args, out=stopped))
    assert second.images == 4
    for x in images[2:]:
        second.update(x)
    for name, value in second.ema.state_dict().items():
        torch.testing.assert_close(value, trainer.ema.state_dict()[name], rtol=0, atol=0)


def test_a_quarter_of_the_views_is_smaller() -> None:
    data = open_dataset(ASSETS / "emoji-64-v1", "heldout")
    example = next(e for e in data if e.image[..., 3].any(axis=1).sum() > 56)
    background = training_view(example, 0)[0, 0]
    assert background.shape == (3,)
    heights = []
    for variant in range(200):
        image = training_view(example, variant).astype(int)
        heights.append(int((np.abs(image - image[:, :1]).sum(-1) > 30).any(axis=1).sum()))
    assert 20 < sum(height < 0.95 * max(heights) for height in heights) < 70
