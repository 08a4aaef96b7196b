"""Latent consistency distillation: the student agrees with its own average along the teacher's ODE (Luo et al., 2023).

A picture is noised to a random time of a grid, and one guided DDIM step of the teacher takes it to the next lower one.
The student's x0 from the former is drawn to its average's x0 from the latter (Alg. 1), so that after enough training
every point of a trajectory maps to its end. No solution of the whole ODE is computed, and no critic trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.backbones.base import STUDENT
from core.data.batches import Batch
from core.diffusion.solvers import ddim_step
from core.losses.distill import huber, mse
from core.methods.base import Method, Optimizer, Player, Role, Rollout, Turn, draw
from core.methods.clock import Clock

TARGET = "target"


@dataclass
class LcmRollout(Rollout):
    """The student's input, and the x0 with which it is to agree."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    target: Tensor  # (B, C, H, W)


class Lcm(Method):
    """See the module's docstring; settings are ``LcmConfig``."""

    def roles(self) -> list[Role]:
        """The student's, and the average of the student that gives its target."""
        return [*super().roles(), Role(TARGET, STUDENT, follows=STUDENT, decay=self.config.target_decay)]

    def build(self) -> None:
        self.timesteps = self.backbone.process.timesteps(self.config.num_timesteps)

    @property
    def distance(self) -> Callable[[Tensor, Tensor], Tensor]:
        """d(a, b) per sample (B,)."""
        return partial(huber, c=self.config.huber_c) if self.config.distance == "huber" else mse

    def players(self) -> list[Player]:
        config = self.config
        return [self.student_player(Optimizer(config.student_lr, tuple(config.adam_betas), config.weight_decay))]

    def turns(self, clock: Clock) -> Sequence[Turn]:
        """The student in every iteration."""
        return (Turn(STUDENT),)

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        return {"consistency": 1.0}

    @torch.no_grad()
    def rollout(self, batch: Batch, clock: Clock) -> LcmRollout:
        """x_t at t_n+1, one step of the teacher to t_n, and the average's x0 there."""
        process, cond, p = self.backbone.process, batch.cond, batch.positions
        index = self.stream(STUDENT, "timestep").integers(p, 0, len(self.timesteps))
        noise = draw(self.stream(STUDENT, "noise").normal(p, batch.x0.shape[1:]), batch.x0)
        t = draw(self.timesteps[index], batch.x0)
        x_t = process.add_noise(batch.x0, noise, t)
        x0, saved = self._teacher_x0(batch, x_t, t)
        # The last step ends at the data, where a consistency model is the identity
        is_last = draw(index + 1 == len(self.timesteps), batch.x0)[:, None, None, None]
        following = draw(self.timesteps[(index + 1) % len(self.timesteps)], batch.x0)
        x_next = ddim_step(x_t, x0, t, following, process)
        target = torch.where(is_last, x0, self.few_step_x0(TARGET, x_next, following, cond))
        return LcmRollout(batch, x_t, t, target, stored=saved)

    def _teacher_x0(self, batch: Batch, x_t: Tensor, t: Tensor) -> tuple[Tensor, int]:
        """The teacher's guided x0 at the student's input, and the evaluations that sharing it has saved."""
        low, high = self.config.guidance_min, self.config.guidance_max
        w = self.uniform_guidance("guidance", batch, low, high)
        return self.once(
            "teacher x0",
            (len(self.timesteps), low, high),
            batch.positions,
            lambda: self.backbone.guided(self.teacher, x_t, t, batch.cond, batch.null, w),
            cost=self.backbone.passes(w, self.teacher) * len(x_t),
        )

    def losses(self, turn: str, rollout: LcmRollout, clock: Clock) -> dict[str, Tensor]:
        x0 = self.student_x0(rollout.x_t, rollout.t, rollout.batch.cond)
        rollout.samples = x0.detach()
        return {"consistency": self.distance(x0, rollout.target).mean()}
