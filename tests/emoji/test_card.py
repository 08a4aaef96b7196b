"""The card's sampler against diffusers' own pipeline and solver."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, Flux2KleinPipeline, StableDiffusionPipeline

from core.methods.teacher import teacher_sample
from core.randomness import Stream
from core.sampler import Sampler
from experiments.emoji.card import DrawingTeacher

ASSETS = Path(__file__).parents[2] / "experiments" / "emoji" / "assets"
TEACHER, FLUX2 = ASSETS / "emoji-sd-v1", ASSETS / "emoji-flux2-v1"


def test_the_card_shows_what_diffusers_draws() -> None:
    prompts = ["red apple", "blue heart"]
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    noise = torch.from_numpy(Stream(3, "card", "noise").normal(range(2), (8, 8, 8))).float()
    theirs = pipeline(prompts, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="np").images
    ours = DrawingTeacher(TEACHER, "unet")(prompts, 4, 3.0, seed=3)
    assert np.abs(ours - np.round(255 * theirs)).max() <= 2 and ours.std() > 20


def test_the_embedded_flux2_draws_in_colour_what_diffusers_draws() -> None:
    """Euler's method, as its pipeline samples; hearts of two colours on a white background."""
    prompts = ["blue heart on a white background", "red heart on a white background"]
    pipeline = Flux2KleinPipeline.from_pretrained(FLUX2)
    pipeline.set_progress_bar_config(disable=True)
    teacher = DrawingTeacher(FLUX2, "flux2")
    noise = torch.from_numpy(Stream(3, "card", "noise").normal(range(2), teacher.backbone.latent_shape)).float()
    theirs = pipeline(
        prompt=prompts, height=64, width=64, num_inference_steps=8, guidance_scale=3.0, latents=noise, output_type="np",
        sigmas=np.linspace(1, 1 / 8, 8), max_sequence_length=24, text_encoder_out_layers=(1, 2, 3),
    ).images  # fmt: skip
    cond = teacher.backbone.encode_text(prompts)
    ours = teacher.backbone.decode(teacher_sample(teacher.backbone, noise, cond, teacher.null, Sampler("ddim", 8, 3.0)))
    assert np.abs(ours - np.round(255 * theirs)).max() <= 2
    red_over_blue = ours[:, 24:40, 24:40, 0].astype(float) - ours[:, 24:40, 24:40, 2]
    assert red_over_blue[0].mean() < -40 and red_over_blue[1].mean() > 40
    assert teacher(prompts, 8, 3.0, seed=3)[:, :4].mean() > 230, "the background"
