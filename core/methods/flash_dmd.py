"""Flash-DMD's first stage: distribution matching at high noise, realism at low noise (Chen et al., 2025).

Three additions to DMD2. The student's steps are divided: the DM term has those of high noise, the critic those of low
noise. An update's sample of high noise is taken to the end by the student's own sampling, without a graph, noised again
to a low time, and what the student makes of that is what the critic judges. The critic sees decoded images through a
frozen encoder, so that the fake score has no other duty than to denoise. And after each update of the student the
fake score moves a little towards it, so that it keeps up although it is updated as seldom.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from core.backbones.base import FAKE_SCORE, STUDENT
from core.data.batches import Batch
from core.diffusion.solvers import advance
from core.methods.base import Role, draw
from core.methods.dmd2 import Dmd2, Dmd2Rollout


class FlashDmd(Dmd2):
    """See the module's docstring; settings are ``FlashDmdConfig``."""

    def roles(self) -> list[Role]:
        """DMD2's; a fake score that follows the student starts as it does: averaged adapters need common factors."""
        decay = self.config.score_ema_decay
        return [
            dataclasses.replace(role, like=STUDENT, follows=STUDENT, decay=decay)
            if role.name == FAKE_SCORE and decay < 1
            else role
            for role in super().roles()
        ]

    @property
    def matched_steps(self) -> int:
        return self.config.num_steps - self.config.num_low_noise_steps

    def judged(self, rollout: Dmd2Rollout, x0: Tensor) -> Tensor:
        """The student's x0 at low noise, made from its x0 at high noise; what was made with a graph serves again."""
        if not self.config.num_low_noise_steps:
            return super().judged(rollout, x0)
        if rollout.judged is None or torch.is_grad_enabled():
            x_t, t = self._noised_again(x0.detach(), rollout.batch)
            judged = self.student_x0(x_t, t, rollout.batch.cond)
            rollout.judged = judged.detach()
            return judged
        return rollout.judged

    @torch.no_grad()
    def _noised_again(self, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The end of the sampling that ``x0`` is a step of, noised to a time of low noise: x_t (B, C, H, W), t (B,)."""
        p, process, last = batch.positions, self.backbone.process, self.config.num_steps - 1
        final_t = draw(self.timesteps[[last] * len(p)], x0)
        final = self.student_x0(self._before_the_last(x0, batch), final_t, batch.cond)
        low = self.stream(STUDENT, "low-noise step").integers(p, self.matched_steps, self.config.num_steps)
        noise = draw(self.stream(STUDENT, "low noise").normal(p, x0.shape[1:]), x0)
        t = draw(self.timesteps[low], x0)
        return process.add_noise(final, noise, t), t

    def _before_the_last(self, x0: Tensor, batch: Batch) -> Tensor:
        """The state before the last step of the sampling, in which ``x0`` came of ``_steps``."""
        following, last = self._steps(batch.positions) + 1, self.config.num_steps - 1
        noises, process = self.noises(batch), self.backbone.process
        noise = torch.stack([noises[step][row] for row, step in enumerate(following)])
        x_t = process.add_noise(x0, noise, draw(self.timesteps[following], x0))
        first = 1 if self.lockstep else int(following.min())  # where all processes must call it equally often
        steps, stop = range(first, last), [last] * len(following)
        return advance(self.denoise(batch), x_t, noises, following.tolist(), stop, steps, self.timesteps, process)
