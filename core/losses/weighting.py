"""Weights of the squared error of x0 by time, given alpha and sigma (Salimans & Ho, 2022, Sec. 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def constant(alpha: Tensor, sigma: Tensor) -> Tensor:
    """1 at every time."""
    return torch.ones_like(sigma)


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha^2 / sigma^2: the error of eps, which is none at pure noise."""
    return (alpha / sigma).square()


def truncated_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """max(snr, 1): the larger of the errors of x0 and of eps."""
    return snr(alpha, sigma).clamp(min=1)


def velocity(alpha: Tensor, sigma: Tensor) -> Tensor:
    """1 / sigma^2: the error of v in a variance-preserving process, where it is snr + 1, and of a flow's velocity."""
    return sigma**-2


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": constant, "snr": snr, "truncated_snr": truncated_snr, "v": velocity,
}  # fmt: skip
