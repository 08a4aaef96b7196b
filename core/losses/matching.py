"""Distribution matching distillation (DMD): the gradient of KL(student || teacher) at a noised sample.

The gradient w.r.t. a student sample is proportional to s_fake - s_real = alpha (x0_fake - x0_real)/sigma^2,
the scores of the two distributions at the noised sample. DMD replaces that factor by a normaliser per sample
(Yin et al., 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def dmd_gradient(x0: Tensor, real_x0: Tensor, fake_x0: Tensor, eps: float = 1e-5) -> Tensor:
    """The gradient (x0_fake - x0_real)/(mean_{C,H,W} |x0 - x0_real| + eps), (B, C, H, W), at least float32.

    ``x0`` is the student's sample, ``real_x0`` and ``fake_x0`` the denoised estimates of its noised version
    by the teacher and by the model of the student's distribution. The normaliser is one number per sample,
    never one per batch.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    x0, real_x0, fake_x0 = x0.to(dtype), real_x0.to(dtype), fake_x0.to(dtype)
    normaliser = (x0 - real_x0).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    return (fake_x0 - real_x0) / (normaliser + eps)


def dmd_loss(x0: Tensor, grad: Tensor) -> Tensor:
    """The loss mean (x0 - sg(x0 - grad))^2, a scalar whose gradient w.r.t. x0 is 2 grad/(B C H W).

    Flash Diffusion has no 1/2 here; DMD2 has one (give it half the weight).
    """
    x0 = x0.to(grad.dtype)
    return (x0 - (x0 - grad).detach()).square().mean()
