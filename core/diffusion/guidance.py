"""Classifier-free guidance, one convention: x_w = w x_cond + (1 - w) x_null, so w = 1 is no guidance.

It applies alike to x0, eps, v and flow predictions, which are affine in each other at fixed x_t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def combine(cond: Tensor, null: Tensor, w: Tensor | float) -> Tensor:
    """Guided prediction (B, C, H, W); ``w`` is a number or one value per sample (B,)."""
    if isinstance(w, Tensor) and w.ndim == 1:
        w = w.to(cond.dtype).view(-1, *[1] * (cond.ndim - 1))
    return w * cond + (1 - w) * null


def fourier_features(w: Tensor, width: int) -> Tensor:
    """Sines, then cosines of 1000 (w - 1) at ``width`` / 2 frequencies from 1 to 1e-4, float32 (B, width).

    Latent consistency models' embedding of guidance, by the formula of diffusers' pipelines, which count w as we do and
    embed its excess over 1.
    """
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * (-math.log(10000.0) / (half - 1))
    )
    angles = 1000.0 * (w.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def from_excess(w: Tensor | float) -> Tensor | float:
    """The w of x_cond + w (x_cond - x_null), as LCM counts it, in this project's convention."""
    return w + 1
