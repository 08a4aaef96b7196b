"""Distances of the student's x0 from a target, such as the teacher's ODE solution (Flash Diffusion, Eq. 6)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, float32 (B,)."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


def l1(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error per sample, float32 (B,)."""
    return (pred.float() - target.float()).abs().flatten(1).mean(1)


def huber(pred: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber distance sqrt(d^2 + c^2) - c per sample, mean over elements, float32 (B,).

    Latent consistency models' distance in their released training (Luo et al., 2023); ``c`` bounds where it is
    quadratic.
    """
    squares = (pred.float() - target.float()).square()
    return ((squares + c**2).sqrt() - c).flatten(1).mean(1)


DISTILL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "l1": l1}
