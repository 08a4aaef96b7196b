"""The miniature FLUX.2 as it is trained is what its pipeline folder gives, loaded as FLUX.2 is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, Flux2KleinPipeline

from core.backbones.flux2 import Flux2Backbone
from core.backbones.roles import Sharing, keyed_init
from core.backbones.tiny import TINY_VAE
from core.data.shards import Example
from experiments.emoji.recipes.flux2_recipe import Flux2Recipe
from experiments.emoji.recipes.train_teacher import RECIPES

CAPTIONS = ["red apple", "woman pilot dark skin tone", "blue heart on a red background"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flux2Recipe, torch.nn.Module, Path, AutoencoderKL]:
    folder = tmp_path_factory.mktemp("recipe")
    meta = {"group": "food & drink", "subgroup": "food-fruit"}
    image = np.zeros((64, 64, 3), np.uint8)
    examples = [Example(key=str(i), image=image, caption=text, meta=meta) for i, text in enumerate(CAPTIONS * 4)]
    recipe = RECIPES["flux2"](examples, folder)
    with keyed_init("recipe"):
        networks = recipe.networks(8).half().float()  # as the folder rounds them
        vae = AutoencoderKL(**(TINY_VAE | {"latent_channels": 8}), scaling_factor=0.7).half().float()
        recipe.latents(torch.randn(16, 8, 8, 8) * 2 + 1, vae)
    recipe.export(folder / "pipeline", networks, vae)
    return recipe, networks.eval(), folder / "pipeline", vae


def test_it_predicts_what_was_trained(exported: tuple) -> None:
    recipe, networks, folder, _ = exported
    backbone = Flux2Backbone.load(str(folder), Sharing("full"), image_size=64)
    assert backbone.latent_shape == (32, 4, 4) and backbone.process.shift == 1.0
    x_t = torch.randn(4, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 0.7, 0.3, 0.05])
    with torch.no_grad():
        expected = networks(x_t, t, recipe.ids(CAPTIONS))  # the captions, then the empty one
        found = backbone.predict("teacher", x_t, 1000 * t, backbone.encode_text([*CAPTIONS, ""]), as_="flow")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_its_latents_are_the_vaes_in_normalised_patches(exported: tuple) -> None:
    recipe, _, folder, vae = exported
    backbone = Flux2Backbone.load(str(folder), Sharing("full"), image_size=64)
    images = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    scaled = backbone_latents(vae, images)
    mean, variance = recipe.mean.clone(), recipe.variance.clone()
    patches = (scaled / 0.7).view(5, 8, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(5, 32, 4, 4)
    expected = (patches - mean.view(1, -1, 1, 1)) / (variance + 1e-4).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(backbone.encode(images), expected, rtol=1e-2, atol=1e-2)
    own = recipe.latents(scaled, vae).float()
    assert own.mean((0, 2, 3)).abs().max() < 1e-2 and (own.var((0, 2, 3)) - 1).abs().max() < 2e-2


def backbone_latents(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor


def test_diffusers_alone_draws_with_it(exported: tuple) -> None:
    pipe = Flux2KleinPipeline.from_pretrained(exported[2])
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        prompt="red apple", height=64, width=64, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=24,
        text_encoder_out_layers=(1, 2, 3),
    ).images[0]  # fmt: skip
    assert image.size == (64, 64)


def test_a_flow_is_straight() -> None:
    x0, eps = torch.randn(3, 32, 4, 4), torch.randn(3, 32, 4, 4)
    x_t, t, velocity = Flux2Recipe.noised(None, x0, eps, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(x_t - t.view(-1, 1, 1, 1) * velocity, x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_t + (1 - t.view(-1, 1, 1, 1)) * velocity, eps, rtol=1e-5, atol=1e-5)
