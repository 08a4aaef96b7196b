"""Regression of the student's x0 on the teacher's ODE solution (Flash Diffusion, Eq. 6), by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, float32 (B,)."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


def l1(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error per sample, float32 (B,)."""
    return (pred.float() - target.float()).abs().flatten(1).mean(1)


DISTILL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "l1": l1}
