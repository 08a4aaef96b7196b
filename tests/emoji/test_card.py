"""The card's sampler against diffusers' own pipeline and solver."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from core.randomness import Stream
from experiments.emoji.card import Sampler

TEACHER = Path(__file__).parents[2] / "experiments" / "emoji" / "assets" / "emoji-sd-v1"


def test_the_card_shows_what_diffusers_draws() -> None:
    prompts = ["red apple", "blue heart"]
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    noise = torch.from_numpy(Stream(3, "card", "noise").normal(range(2), (8, 8, 8))).float()
    theirs = pipeline(prompts, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="np").images
    ours = Sampler(TEACHER, "unet")(prompts, 4, 3.0, seed=3)
    assert np.abs(ours - np.round(255 * theirs)).max() <= 2 and ours.std() > 20
