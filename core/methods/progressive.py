"""Progressive distillation: the student takes in one DDIM step where its teacher goes in two (Salimans & Ho, 2022).

A picture is noised to z at a time t of the student's grid. The teacher's two half-steps give z_s at the next time s,
and the target is the x0 with which one step leads there:

    x~ = (z_s - (sigma_s / sigma_t) z) / (alpha_s - (sigma_s / sigma_t) alpha_t).

Where the teacher has three times as many steps or more, it takes as many parts of a step. One run is one round; the
student of the round before is the next teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.backbones.base import STUDENT, STUDENT_EMA
from core.config import UserError
from core.data.batches import Batch
from core.diffusion.solvers import ddim_coefficients
from core.losses.distill import mse
from core.losses.weighting import WEIGHTINGS
from core.methods.base import Method, Optimizer, Player, Rollout, Turn, draw
from core.methods.clock import Clock
from core.sampler import Sampler, Setting


@dataclass
class ProgressiveRollout(Rollout):
    """The student's input, and the x0 with which one step of its leads where the teacher's do."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    target: Tensor  # (B, C, H, W)


class Progressive(Method):
    """See the module's docstring; settings are ``ProgressiveConfig``."""

    consistency = False

    def readings(self) -> dict[str, str]:
        """The student's, its average's and a parent's output as the setting says."""
        if self.config.prediction == "network":
            return {}
        parent = [self.teacher] if self.config.teacher_is_parent else []
        return dict.fromkeys([STUDENT, STUDENT_EMA, *parent], self.config.prediction)

    @property
    def teacher_setting(self) -> Setting:
        """A parent's pictures are drawn as it was trained."""
        if not self.config.teacher_is_parent:
            return super().teacher_setting
        w = self.config.teacher_guidance if self.backbone.takes_guidance(self.teacher) else 1.0
        return Setting("teacher", Sampler("ddim", self.config.teacher_steps, w))

    def build(self) -> None:
        process, steps, parts = self.backbone.process, self.config.student_steps, self.config.parts
        self.timesteps = process.timesteps(steps)
        self.teacher_timesteps = process.divided(steps, parts)
        self.step, self.teacher_step = (
            ddim_coefficients(process, grid) for grid in (self.timesteps, self.teacher_timesteps)
        )
        self._check_prediction()

    def _check_prediction(self) -> None:
        """UserError where the student cannot say what x0 is at the first of its times."""
        alpha, _ = self.backbone.process.alpha_sigma(torch.from_numpy(self.timesteps[:1]))
        if self.backbone.kind_of(STUDENT) == "eps" and alpha.item() == 0:
            raise UserError(
                f"method.prediction={self.config.prediction} is eps, which says nothing of x0 at pure noise, where "
                "this process has alpha = 0; allowed: x0, v, flow"
            )

    def players(self) -> list[Player]:
        config = self.config
        return [self.student_player(Optimizer(config.student_lr, tuple(config.adam_betas), config.weight_decay))]

    def turns(self, clock: Clock) -> Sequence[Turn]:
        """The student in every iteration."""
        return (Turn(STUDENT),)

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        return {"distill": 1.0}

    def rollout(self, batch: Batch, clock: Clock) -> ProgressiveRollout:
        """x_t at a time of the student's grid, and its target."""
        index = self.stream(STUDENT, "timestep").integers(batch.positions, 0, self.config.student_steps)
        noise = draw(self.stream(STUDENT, "noise").normal(batch.positions, batch.x0.shape[1:]), batch.x0)
        t = draw(self.timesteps[index], batch.x0)
        full_noise = draw(index == 0, batch.x0)[:, None, None, None]  # sampling starts there from pure noise
        x_t = torch.where(full_noise, noise, self.backbone.process.add_noise(batch.x0, noise, t))
        w = self.teacher_w(batch)
        cost = self.backbone.passes(w, self.teacher) * self.config.parts * len(x_t)
        target, stored = self.teacher_solution(batch.positions, lambda: self.target(batch, x_t, index, w), cost)
        return ProgressiveRollout(batch, x_t, t, target.to(x_t.device, non_blocking=True), stored=stored)

    def teacher_w(self, batch: Batch) -> Tensor | float:
        """The teacher's guidance; a parent that takes none as an input has that of the rounds before."""
        if self.config.teacher_is_parent and not self.backbone.takes_guidance(self.teacher):
            return 1.0
        return self.uniform_guidance("guidance", batch, self.config.guidance_min, self.config.guidance_max)

    @torch.no_grad()
    def target(self, batch: Batch, x_t: Tensor, index: np.ndarray, w: Tensor | float) -> Tensor:
        """x~ of the student's steps ``index`` (B,) from x_t, by the teacher's steps; (B, C, H, W)."""
        z, parts = x_t, self.config.parts
        for part in range(parts):
            row = index * parts + part
            t = draw(self.teacher_timesteps[row], x_t)
            x0 = self.backbone.guided(self.teacher, z, t, batch.cond, batch.null, w)
            decay, gain = (_of_samples(values[row], x0) for values in self.teacher_step)
            z = decay * z + gain * x0
        decay, gain = (_of_samples(values[index], z) for values in self.step)
        return (z - decay * x_t) / gain

    def losses(self, turn: str, rollout: ProgressiveRollout, clock: Clock) -> dict[str, Tensor]:
        x0 = self.predict_student(rollout)
        rollout.samples = x0.detach()
        alpha, sigma = self.backbone.process.alpha_sigma(rollout.t)
        weight = WEIGHTINGS[self.config.weighting](alpha, sigma).flatten()
        return {"distill": (weight * mse(x0, rollout.target)).mean()}

    def predict_student(self, rollout: ProgressiveRollout) -> Tensor:
        """The student's x0 at its input."""
        return self.student_x0(rollout.x_t, rollout.t, rollout.batch.cond)


def _of_samples(values: np.ndarray, like: Tensor) -> Tensor:
    """One number per sample, as a factor of latents."""
    return draw(values, like, like.dtype).view(-1, 1, 1, 1)
