"""UniPC (Zhao et al., 2023) for the teacher, through diffusers' scheduler: a baseline beside our own solvers."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from core.diffusion.process import VPProcess
from core.diffusion.solvers import Denoise


@torch.no_grad()
def unipc(denoise: Denoise, x: Tensor, num_steps: int, process: VPProcess) -> Tensor:
    """x0 (B, C, H, W) float32 after ``num_steps`` evaluations from pure noise ``x``, on our trailing timesteps.

    Order 2 with its corrector and predicted x0, the scheduler's defaults and those of the paper for guided sampling.
    """
    betas = 1 - process.alphas_cumprod / np.append(1.0, process.alphas_cumprod[:-1])
    scheduler = UniPCMultistepScheduler(
        trained_betas=betas, prediction_type="sample", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps, device=x.device)
    rows, x = torch.arange(len(x), device=x.device), x.float()
    for t in scheduler.timesteps:
        x0 = denoise(x, t.expand(len(x)), rows)
        x = scheduler.step(x0, t, x).prev_sample
    return x
