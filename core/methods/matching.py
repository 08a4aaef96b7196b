"""The distribution matching term of every method that has one: two scores at one keyed noising of the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from core.backbones.base import STUDENT
from core.data.batches import Batch
from core.losses.matching import dmd_gradient, dmd_loss
from core.methods.base import Method, draw


def distribution_matching(
    method: Method,
    x0: Tensor,
    batch: Batch,
    w: Tensor | float,
    fake_score: str | None,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """``dmd_loss`` at t'' ~ U[low, high) of T: the teacher guided by ``w`` against the role ``fake_score``.

    Without a role (None) the sample stands for its own estimate, and the term pulls it to the teacher's alone.
    """
    with torch.no_grad():
        process, p = method.backbone.process, batch.positions
        t = process.timestep(draw(method.stream(STUDENT, "dmd_timestep").uniform(p, low, high), x0))
        noise = draw(method.stream(STUDENT, "dmd_noise").normal(p, x0.shape[1:]), x0)
        x_t = process.add_noise(x0.detach(), noise, t)
        real = method.backbone.guided(method.teacher, x_t, t, batch.cond, batch.null, w)
        fake = x0.detach() if fake_score is None else method.backbone.predict(fake_score, x_t, t, batch.cond)
        gradient = dmd_gradient(x0.detach(), real, fake)
    return dmd_loss(x0, gradient)
