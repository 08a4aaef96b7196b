"""Sampling as a user of diffusers writes it: a pipeline in bf16 with LCM's scheduler, four steps, guidance off.

Mirrored: all parts are in bf16; adapters stay attached as ``load_lora_weights`` leaves them; prompts are encoded
at each call. Spared: pictures are arrays, none is made for PIL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch import nn

from core.backbones.precision import computing_in, lacks_units_for_16_bits
from experiments.bench.references.networks import Adapters


class PipelineReference:
    """A StableDiffusionPipeline; its UNet's evaluations are counted in samples."""

    def __init__(self, source: str, adapters: Adapters | None, device: torch.device) -> None:
        self.evaluations: Counter[str] = Counter()
        options = {"safety_checker": None, "requires_safety_checker": False}
        self.pipeline = StableDiffusionPipeline.from_pretrained(source, **options).to(device, torch.bfloat16)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = LCMScheduler.from_config(self.pipeline.scheduler.config, original_inference_steps=4)
        if adapters is not None:
            targets = list(adapters.targets)
            self.pipeline.unet.add_adapter(
                LoraConfig(r=adapters.rank, lora_alpha=adapters.rank, target_modules=targets)
            )
        self.pipeline.unet.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.evaluations["student"] += len(inputs[0])

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], steps: int) -> np.ndarray:
        """Pictures float (B, H, W, 3) in [0, 1]."""
        with self._products():
            found = self.pipeline(list(prompts), num_inference_steps=steps, guidance_scale=1.0, output_type="np")
        return found.images

    def _products(self) -> AbstractContextManager:
        """A CPU without 16-bit units multiplies as ours does there, or it would take twelve times as long."""
        like = torch.empty(0, device=self.pipeline.device)
        is_slow = like.device.type == "cpu" and lacks_units_for_16_bits()
        return computing_in(torch.bfloat16, like) if is_slow else nullcontext()
