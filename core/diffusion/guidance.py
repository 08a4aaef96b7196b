"""Classifier-free guidance, one convention: x_w = w x_cond + (1 - w) x_null, so w = 1 is no guidance.

It applies alike to x0, eps, v and flow predictions, which are affine in each other at fixed x_t.
"""

from __future__ import annotations

from torch import Tensor


def combine(cond: Tensor, null: Tensor, w: Tensor | float) -> Tensor:
    """Guided prediction (B, C, H, W); ``w`` is a number or one value per sample (B,)."""
    if isinstance(w, Tensor) and w.ndim == 1:
        w = w.to(cond.dtype).view(-1, *[1] * (cond.ndim - 1))
    return w * cond + (1 - w) * null


def from_excess(w: Tensor | float) -> Tensor | float:
    """The w of x_cond + w (x_cond - x_null), as LCM counts it, in this project's convention."""
    return w + 1
