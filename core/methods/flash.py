"""Flash Diffusion: one-step student predictions against multi-step teacher solutions (Chadebec et al., Algorithm 1).

L = distill + adversarial_weight * adversarial + dmd_weight * dmd (Eq. 10). The student predicts x0 from z_t in one
step; the target is the teacher's guided ODE solution from the same z_t. The discriminator reads the frozen teacher's
encoder half; the fake score is the student itself (Sec. 4.4), so no further network exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from core.backbones.base import STUDENT
from core.data.batches import Batch
from core.diffusion.solvers import solve
from core.diffusion.timesteps import timestep_pmf
from core.losses.distill import DISTILL_LOSSES
from core.losses.perceptual import PERCEPTUAL_LOSSES, PerceptualLoss
from core.methods.base import Method, Optimizer, Player, Turn, draw
from core.methods.clock import Clock
from core.methods.latent_gan import CRITIC, GanRollout, LatentGan
from core.methods.matching import distribution_matching


@dataclass
class FlashRollout(GanRollout):
    """Start points of the teacher's ODE and their solutions."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    target: Tensor | None = None  # the teacher's solution from x_t


class Flash(Method):
    """See the module's docstring; settings are ``FlashConfig``."""

    def build(self) -> None:
        self.timesteps = self.backbone.process.timesteps(self.config.num_timesteps)
        self.distill = self._distill_loss()
        self.gan: LatentGan | None = None
        if any(self.config.adversarial_weight):
            config = self.config
            self.gan = LatentGan(self, config.adversarial_loss, config.critic_channels, config.adversarial_timesteps)

    def _distill_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        name = self.config.distill_loss
        if name in DISTILL_LOSSES:
            return DISTILL_LOSSES[name]
        distance = PERCEPTUAL_LOSSES[name](self.config.lpips_path)
        return PerceptualLoss(distance.to(self.backbone.device), self.backbone.training_pixels)

    def players(self) -> list[Player]:
        betas = tuple(self.config.adam_betas)
        student = Optimizer(self.config.student_lr, betas, self.config.weight_decay)
        players = [self.student_player(student)]
        if self.gan is not None:
            players.append(self.gan.player(self.config.critic_lr, betas, self.config.weight_decay))
        return players

    def networks_beside(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        if self.gan is not None:
            found[CRITIC] = self.gan.critic
        if isinstance(self.distill, PerceptualLoss):
            found["perceptual"] = self.distill.distance
        return found

    def turns(self, clock: Clock) -> Sequence[Turn]:
        """Both every iteration; the discriminator trains from stage 0 on, before its weight is positive (release)."""
        return (Turn(STUDENT), Turn(CRITIC)) if self.gan is not None else (Turn(STUDENT),)

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        if turn == CRITIC:
            return {"critic": 1.0}
        stage = clock.stage(len(self.config.stage_weights))
        return {
            "distill": self.config.distill_weight,
            "adversarial": self.config.adversarial_weight[stage],
            "dmd": self.config.dmd_weight[stage],
        }

    def rollout(self, batch: Batch, clock: Clock) -> FlashRollout:
        """z_t with t ~ pi(t) of this stage, and the teacher's solution from it when a loss reads it."""
        pmf = self.pmf(clock)
        index, first_call = self._starts(batch.positions, pmf), None
        if self.lockstep:
            first_call = int(self._starts(clock.positions(), pmf).min())
        noise = draw(self.stream(STUDENT, "noise").normal(batch.positions, batch.x0.shape[1:]), batch.x0)
        t = draw(self.timesteps[index], batch.x0)
        full_noise = draw(index == 0, batch.x0)[:, None, None, None]  # sampling starts there from pure noise
        x_t = torch.where(full_noise, noise, self.backbone.process.add_noise(batch.x0, noise, t))
        rollout = FlashRollout(batch, x_t, t)
        if self.weights(STUDENT, clock)["distill"]:
            target, stored = self._teacher_solution(batch, x_t, index, first_call)
            rollout.target = target.to(x_t.device, non_blocking=True)
            rollout.stored = stored
        return rollout

    def pmf(self, clock: Clock) -> np.ndarray:
        """pi(t) of this stage over the K start points, float64 (K,)."""
        weights = self.config.stage_weights[self.problem_stage(clock)]
        kind, variance = self.config.timestep_distribution, self.config.mixture_variance
        return timestep_pmf(kind, self.config.num_timesteps, weights, variance)

    def problem_stage(self, clock: Clock) -> int | None:
        return clock.stage(len(self.config.stage_weights))

    def _starts(self, positions: np.ndarray, pmf: np.ndarray) -> np.ndarray:
        """Index of each sample's start point, 0 is full noise, int64 (B,)."""
        return self.stream(STUDENT, "timestep").choice(positions, pmf)

    @torch.no_grad()
    def _teacher_solution(
        self, batch: Batch, x_t: Tensor, index: np.ndarray, first_call: int | None
    ) -> tuple[Tensor, int]:
        """The guided solution of the probability-flow ODE from x_t, and the evaluations that the store has saved."""
        guidance = self._guidance("guidance", batch)

        def compute() -> Tensor:
            def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
                w = guidance if isinstance(guidance, float) else guidance[rows]
                return self.backbone.guided(self.teacher, x, t, batch.cond[rows], batch.null, w)

            process, solver = self.backbone.process, self.config.solver
            return solve(denoise, x_t, index, self.timesteps, process, solver, first_call)[0]

        cost = self.backbone.passes(guidance, self.teacher) * int((self.config.num_timesteps - index).sum())
        return self.teacher_solution(batch.positions, compute, cost)

    def _guidance(self, purpose: str, batch: Batch) -> Tensor | float:
        return self.uniform_guidance(purpose, batch, self.config.guidance_min, self.config.guidance_max)

    def losses(self, turn: str, rollout: FlashRollout, clock: Clock) -> dict[str, Tensor]:
        if turn == CRITIC:
            assert self.gan is not None
            return {"critic": self.gan.critic_loss(rollout)}
        return self._student_losses(rollout, clock)

    def _student_losses(self, rollout: FlashRollout, clock: Clock) -> dict[str, Tensor]:
        weights = self.weights(STUDENT, clock)
        x0 = self.student_x0(rollout.x_t, rollout.t, rollout.batch.cond)
        rollout.samples = x0.detach()
        terms: dict[str, Tensor] = {}
        if weights["distill"]:
            terms["distill"] = self.distill(x0, rollout.target).mean()
        if weights["dmd"]:
            # Eq. 9 with the student as fake score; the guidance is a second draw from the range (release)
            w = self._guidance("dmd_guidance", rollout.batch)
            terms["dmd"] = distribution_matching(self, x0, rollout.batch, w, STUDENT)
        if weights["adversarial"]:
            assert self.gan is not None
            terms["adversarial"] = self.gan.student_loss(x0, rollout)
        return terms
