"""Progressive distillation: the student takes in one DDIM step where its teacher goes in two (Salimans & Ho, 2022).

A picture is noised to z at a time t of the student's grid. The teacher's two half-steps give z_s at the next time s,
and the target is the x0 with which one step leads there:

    x~ = (z_s - (sigma_s / sigma_t) z) / (alpha_s - (sigma_s / sigma_t) alpha_t).

Where the teacher has three times as many steps or more, it takes as many parts of a step. One run is one round; the
student of the round before is the next teacher. An adversarial term may be added, for rounds below four steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from core.backbones.base import STUDENT
from core.config import UserError
from core.data.batches import Batch
from core.diffusion.solvers import ddim_coefficients
from core.methods.base import Player, Turn, draw
from core.methods.clock import Clock
from core.methods.latent_gan import CRITIC, LatentGan
from core.methods.regression import Problem, Regression, RegressionRollout
from core.sampler import Sampler, Setting


class Progressive(Regression):
    """See the module's docstring; settings are ``ProgressiveConfig``."""

    def build(self) -> None:
        process, steps, parts = self.backbone.process, self.config.student_steps, self.config.parts
        self.timesteps = process.timesteps(steps)
        self.teacher_timesteps = process.divided(steps, parts)
        self.step, self.teacher_step = (
            ddim_coefficients(process, grid) for grid in (self.timesteps, self.teacher_timesteps)
        )
        self.gan: LatentGan | None = None
        if self.config.adversarial_weight:
            config = self.config
            self.gan = LatentGan(self, config.adversarial_loss, config.critic_channels, config.adversarial_timesteps)
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
        players = super().players()
        if self.gan is not None:
            betas = tuple(self.config.adam_betas)
            players.append(self.gan.player(self.config.critic_lr, betas, self.config.weight_decay))
        return players

    def networks_beside(self) -> dict[str, nn.Module]:
        return {} if self.gan is None else {CRITIC: self.gan.critic}

    def turns(self, clock: Clock) -> Sequence[Turn]:
        """The student in every iteration, and its critic."""
        return (Turn(STUDENT),) if self.gan is None else (Turn(STUDENT), Turn(CRITIC))

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        if turn == CRITIC:
            return {"critic": 1.0}
        return super().weights(turn, clock) | {"adversarial": self.config.adversarial_weight}

    def losses(self, turn: str, rollout: RegressionRollout, clock: Clock) -> dict[str, Tensor]:
        if turn == CRITIC:
            assert self.gan is not None
            return {"critic": self.gan.critic_loss(rollout)}
        return super().losses(turn, rollout, clock)

    def further_terms(self, x0: Tensor, rollout: RegressionRollout) -> dict[str, Tensor]:
        """The adversarial term, where it has a weight."""
        return {} if self.gan is None else {"adversarial": self.gan.student_loss(x0, rollout)}

    @property
    def teacher_setting(self) -> Setting:
        """A parent's pictures are drawn as it was trained."""
        if not self.config.teacher_is_parent:
            return super().teacher_setting
        w = self.config.teacher_guidance if self.backbone.takes_guidance(self.teacher) else 1.0
        return Setting("teacher", Sampler("ddim", self.config.teacher_steps, w))

    @property
    def calls(self) -> int:
        return self.config.parts

    def times(self, batch: Batch) -> tuple[Tensor, np.ndarray, Tensor]:
        """Uniform over the student's grid, whose first time is pure noise."""
        index = self.stream(STUDENT, "timestep").integers(batch.positions, 0, self.config.student_steps)
        return draw(self.timesteps[index], batch.x0), index, draw(index == 0, batch.x0)

    def teacher_w(self, batch: Batch) -> Tensor | float:
        """The teacher's guidance; a parent that takes none as an input has that of the rounds before."""
        if self.config.teacher_is_parent and not self.backbone.takes_guidance(self.teacher):
            return 1.0
        return super().teacher_w(batch)

    @torch.no_grad()
    def target(self, problem: Problem) -> Tensor:
        """x~ of one step of the student's, by the teacher's steps; (B, C, H, W)."""
        batch, index, z, parts = problem.batch, problem.index, problem.x_t, self.config.parts
        for part in range(parts):
            row = index * parts + part
            t = draw(self.teacher_timesteps[row], z)
            x0 = self.backbone.guided(self.teacher, z, t, batch.cond, batch.null, problem.w)
            decay, gain = (_of_samples(values[row], x0) for values in self.teacher_step)
            z = decay * z + gain * x0
        decay, gain = (_of_samples(values[index], z) for values in self.step)
        return (z - decay * problem.x_t) / gain


def _of_samples(values: np.ndarray, like: Tensor) -> Tensor:
    """One number per sample, as a factor of latents."""
    return draw(values, like, like.dtype).view(-1, 1, 1, 1)
