"""Guidance distillation: one pass of the student at any w for two of the guided teacher (Meng et al., 2023).

A picture is noised to any time; the target is the teacher's x_w = w x_cond + (1 - w) x_null with w drawn from a range.
The student takes w as an input: a Fourier embedding beside that of the time, whose layer starts at zero, so that it
begins as the conditional teacher. With as many steps as the teacher it then takes half of the evaluations, and it is
the first parent of a chain of rounds that take w, too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from core.backbones.base import STUDENT
from core.data.batches import Batch
from core.methods.base import draw
from core.methods.regression import Problem, Regression


class Guidance(Regression):
    """See the module's docstring; settings are ``GuidanceConfig``."""

    def build(self) -> None:
        steps = self.config.num_timesteps
        self.timesteps = self.backbone.process.timesteps(steps) if steps else None

    @property
    def calls(self) -> int:
        return 1

    def times(self, batch: Batch) -> tuple[Tensor, np.ndarray | None, Tensor]:
        """Uniform over all times, or over a grid whose first time is pure noise."""
        stream, p = self.stream(STUDENT, "timestep"), batch.positions
        if self.timesteps is None:
            t = self.backbone.process.timestep(draw(stream.uniform(p), batch.x0))
            return t, None, torch.zeros_like(t, dtype=torch.bool)
        index = stream.integers(p, 0, len(self.timesteps))
        return draw(self.timesteps[index], batch.x0), index, draw(index == 0, batch.x0)

    @torch.no_grad()
    def target(self, problem: Problem) -> Tensor:
        """x_w at the student's input; (B, C, H, W)."""
        batch, w = problem.batch, problem.w
        return self.backbone.guided(self.teacher, problem.x_t, problem.t, batch.cond, batch.null, w)
