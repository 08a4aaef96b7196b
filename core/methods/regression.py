"""The base of methods whose student regresses on an x0 that the teacher gives: one player, one weighted squared error.

The student is no consistency model: it is sampled along the ODE, as its teacher is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.backbones.base import STUDENT, STUDENT_EMA, Cond
from core.data.batches import Batch
from core.losses.distill import mse
from core.losses.weighting import WEIGHTINGS
from core.methods.base import Method, Optimizer, Player, Turn, draw
from core.methods.clock import Clock
from core.methods.latent_gan import GanRollout


@dataclass
class Problem:
    """A noised picture and what the teacher is asked about it; ``index`` is on the method's grid, where it has one."""

    batch: Batch
    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    w: Tensor | float
    index: np.ndarray | None = None


@dataclass
class RegressionRollout(GanRollout):
    """The student's input, and the x0 that it is to predict there."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    cond: Cond  # with guidance where the student takes it
    target: Tensor  # (B, C, H, W)


class Regression(Method):
    """See the module's docstring; settings are a ``RegressionConfig``."""

    consistency = False

    def readings(self) -> dict[str, str]:
        """The student's, its average's and a parent's output as the setting says."""
        if self.config.prediction == "network":
            return {}
        parent = [self.teacher] if self.config.teacher_is_parent else []
        return dict.fromkeys([STUDENT, STUDENT_EMA, *parent], self.config.prediction)

    def players(self) -> list[Player]:
        config = self.config
        return [self.student_player(Optimizer(config.student_lr, tuple(config.adam_betas), config.weight_decay))]

    def turns(self, clock: Clock) -> Sequence[Turn]:
        """The student in every iteration."""
        return (Turn(STUDENT),)

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        return {"distill": 1.0}

    @abstractmethod
    def times(self, batch: Batch) -> tuple[Tensor, np.ndarray | None, Tensor]:
        """t (B,), its index on a grid if there is one, and whether it is pure noise, bool (B,)."""

    @abstractmethod
    def target(self, problem: Problem) -> Tensor:
        """The teacher's x0 (B, C, H, W), without graph."""

    @property
    @abstractmethod
    def calls(self) -> int:
        """Calls of the guided teacher for one target."""

    def rollout(self, batch: Batch, clock: Clock) -> RegressionRollout:
        """A noised picture, and the teacher's x0 for it."""
        batch, shape = self._shown(batch), batch.x0.shape[1:]
        t, index, full_noise = self.times(batch)
        noise = draw(self.stream(STUDENT, "noise").normal(batch.positions, shape), batch.x0)
        x_t = self.backbone.process.add_noise(batch.x0, noise, t)
        x_t = torch.where(full_noise[:, None, None, None], noise, x_t)  # sampling starts there from pure noise
        problem = Problem(batch, x_t, t, self.teacher_w(batch), index)
        cost = self.backbone.passes(problem.w, self.teacher) * self.calls * len(x_t)
        target, stored = self.teacher_solution(batch.positions, lambda: self.target(problem), cost)
        target = target.to(x_t.device, non_blocking=True)
        return RegressionRollout(batch, x_t, t, self.student_cond(problem), target, stored=stored)

    def _shown(self, batch: Batch) -> Batch:
        """The batch with the empty prompt at the share ``null_prob`` of its samples."""
        if not self.config.null_prob:
            return batch
        dropped = self.stream(STUDENT, "null").uniform(batch.positions) < self.config.null_prob
        cond = batch.cond.where(draw(dropped, batch.x0), batch.null.beside(batch.cond))
        return Batch(batch.positions, batch.x0, cond, batch.null)

    def teacher_w(self, batch: Batch) -> Tensor | float:
        """The teacher's guidance, a draw per sample or a number."""
        return self.uniform_guidance("guidance", batch, self.config.guidance_min, self.config.guidance_max)

    def student_cond(self, problem: Problem) -> Cond:
        """The student's conditioning, with guidance where it is an input."""
        if STUDENT not in self.backbone.guidance_inputs:
            return problem.batch.cond
        w = torch.as_tensor(problem.w, dtype=torch.float32, device=problem.x_t.device)
        return problem.batch.cond.also({"guidance": w.expand(len(problem.x_t))})

    def losses(self, turn: str, rollout: RegressionRollout, clock: Clock) -> dict[str, Tensor]:
        x0 = self.student_x0(rollout.x_t, rollout.t, rollout.cond)
        rollout.samples = x0.detach()
        alpha, sigma = self.backbone.process.alpha_sigma(rollout.t)
        weight = WEIGHTINGS[self.config.weighting](alpha, sigma).flatten()
        return {"distill": (weight * mse(x0, rollout.target)).mean(), **self.further_terms(x0, rollout)}

    def further_terms(self, x0: Tensor, rollout: RegressionRollout) -> dict[str, Tensor]:
        """Terms of the student's turn beside the regression."""
        return {}
