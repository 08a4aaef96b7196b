"""The RL turn of a few-step student (Flash-DMD, stage 2): it learns from preferences between its own next states.

A component: a method of a few-step student (``timesteps``: the sampler's grid) has one, asks it for its roles, gives it
some of the student's turns, and calls its losses in them. p_ref is a frozen role that starts as the student does, after
``train.init_from``: on one base an adapter, and a part of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from core.backbones.base import REFERENCE, REWARD_MODEL, STUDENT
from core.data.batches import Batch
from core.diffusion.solvers import simulate
from core.losses.preference import Pairs, check_rewards, choose_pairs, log_ratio, preference_loss
from core.methods.base import Method, Role, Rollout, Turn, draw
from core.methods.clock import Clock
from core.methods.rl_settings import RlConfig
from core.rewards.base import Prompts, Reward
from core.rewards.registry import load_reward

RL = "rl"
DISTANCE = "rl/distance_to_reference"


class Reinforcement:
    """See the module's docstring; ``settings`` are the method's part ``rl``."""

    def __init__(self, settings: RlConfig, method: Method) -> None:
        self.settings, self.method, self.backbone = settings, method, method.backbone

    @cached_property
    def reward(self) -> Reward:
        """The reward model, loaded at its first use."""
        return load_reward(self.settings.reward, self.settings.reward_path, self.backbone)

    def roles(self) -> list[Role]:
        """The student before RL, which preferences are measured against."""
        prefers = self.settings.is_on and self.settings.objective == "preference"
        return [Role(REFERENCE, STUDENT)] if prefers else []

    def networks(self) -> dict[str, nn.Module]:
        """The reward model's own networks, by name."""
        return self.reward.networks() if self.settings.is_on else {}

    def turn_of_student(self, number: int) -> Turn:
        """The student's turn ``number``, 0 the first: of distillation, or after each one ``ratio`` of RL."""
        if not self.settings.is_on:
            return Turn(STUDENT)
        distils = self.settings.distil and number % (self.settings.ratio + 1) == 0
        return Turn(STUDENT) if distils else Turn(RL, STUDENT)

    def weights(self) -> dict[str, float]:
        return {self.settings.objective: self.settings.weight}

    def reason_to_stop(self, means: Mapping[str, float]) -> str | None:
        """Why the run should end, by what it told on average since the last log point; None: it should not."""
        limit, distance = self.settings.max_distance, means.get(DISTANCE, 0.0)
        if not limit or distance <= limit:
            return None
        return f"{DISTANCE} {distance:.4g} is beyond method.rl.max_distance={limit:g}: the reward may be hacked"

    def losses(self, rollout: Rollout, clock: Clock) -> dict[str, Tensor]:
        """The one term of the turn; what it saw of the reward is told in ``rollout.told``."""
        batch = rollout.batch
        index = self._steps(batch.positions)
        x_t, t = self._states(batch, index, clock), draw(self.method.timesteps[index], batch.x0)
        following = draw(self.method.timesteps[index + 1], batch.x0)
        x0 = self.method.student_x0(x_t, t, batch.cond)
        if rollout.samples is None:
            rollout.samples = x0.detach()
        if self.settings.objective == "reward_gradient":
            return {"reward_gradient": self._reward_gradient(x0, following, rollout)}
        with torch.no_grad():
            reference_x0 = self.method.few_step_x0(REFERENCE, x_t, t, batch.cond)
        return {"preference": self._preference(x0, reference_x0, following, rollout)}

    def _preference(self, x0: Tensor, reference_x0: Tensor, following: Tensor, rollout: Rollout) -> Tensor:
        """The loss over all samples; one whose candidates are too much alike counts as zero."""
        settings, process = self.settings, self.backbone.process
        candidates = self._candidates(x0.detach(), following, rollout.batch.positions)
        rewards = self._rewards(candidates, following, rollout.batch)
        check_rewards(rewards, f"method.rl.reward={settings.reward}")
        pairs = choose_pairs(rewards, settings.min_gap)
        ratios = [
            log_ratio(x, x0, reference_x0, following, process, mean=settings.mean_density) for x in pairs.of(candidates)
        ]
        rollout.told |= self._told(rewards, pairs, [ratio.detach() for ratio in ratios])
        rollout.told[DISTANCE] = (x0.detach() - reference_x0).square().mean()
        return (preference_loss(*ratios, settings.beta, settings.clamp) * pairs.counts).mean()

    def _told(self, rewards: Tensor, pairs: Pairs, ratios: list[Tensor]) -> dict[str, Tensor]:
        gap = rewards.max(1).values - rewards.min(1).values
        win, lose = ratios
        bound = torch.log1p(torch.tensor(self.settings.clamp)) if self.settings.clamp else torch.tensor(torch.inf)
        return {
            "rl/reward": rewards.mean(),
            "rl/gap": gap.mean(),
            "rl/pairs": pairs.counts.float().mean(),
            "rl/agreement": (win > lose).float().mean(),
            "rl/clamped": ((win.abs() > bound.item()) & (lose.abs() > bound.item())).float().mean(),
        }

    def _reward_gradient(self, x0: Tensor, following: Tensor, rollout: Rollout) -> Tensor:
        """Minus the reward at the student's x0 (ReFL, Xu et al., 2023, without its threshold)."""
        if self.reward.space == "latent":
            noise = draw(self._noise("candidate 0", rollout.batch.positions, x0), x0)
            scores = self.reward.score(
                self.backbone.process.add_noise(x0, noise, following), self._prompts(rollout.batch), following
            )
        else:
            scores = self._of_pictures(x0, self._prompts(rollout.batch), following)
        check_rewards(scores.detach(), f"method.rl.reward={self.settings.reward}")
        rollout.told["rl/reward"] = scores.detach().mean()
        return -scores.mean()

    def _steps(self, positions: np.ndarray) -> np.ndarray:
        """The sampling step that each sample's pair begins at, int64 (B,); the last one draws no next state."""
        num_steps = len(self.method.timesteps)
        last = num_steps - 1 if self.settings.noise == "all" else -(-num_steps // 2)
        return self.method.stream(RL, "step").integers(positions, 0, min(last, num_steps - 1))

    def _noise(self, purpose: str, positions: np.ndarray, like: Tensor) -> np.ndarray:
        return self.method.stream(RL, purpose).normal(positions, like.shape[1:])

    @torch.no_grad()
    def _states(self, batch: Batch, index: np.ndarray, clock: Clock) -> Tensor:
        """x_t of the student's own sampling before its call ``index`` (B,)."""
        calls = int(self._steps(clock.positions()).max()) if self.method.lockstep else None
        noises = [
            draw(self._noise(f"noise {step}", batch.positions, batch.x0), batch.x0)
            for step in range((int(index.max()) if calls is None else calls) + 1)
        ]
        denoise, process = self.method.denoise(batch), self.backbone.process
        return simulate(denoise, noises, index.tolist(), self.method.timesteps, process, calls)

    def _candidates(self, x0: Tensor, following: Tensor, positions: np.ndarray) -> Tensor:
        """Next states (B, k, C, H, W) drawn from the student's transition."""
        found = []
        for number in range(self.settings.num_candidates):
            noise = draw(self._noise(f"candidate {number}", positions, x0), x0)
            found.append(self.backbone.process.add_noise(x0, noise, following))
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def _rewards(self, candidates: Tensor, following: Tensor, batch: Batch) -> Tensor:
        """Scores (B, k): of the noisy states themselves, or of the pictures that the student predicts from each."""
        k = candidates.shape[1]
        x, t = candidates.flatten(0, 1), following.repeat_interleave(k)
        prompts = self._prompts(batch).repeat(k)
        if self.reward.space == "latent":
            return self.reward.score(x, prompts, t).view(-1, k)
        return self._of_pictures(self.method.student_x0(x, t, prompts.cond), prompts, t).view(-1, k)

    def _of_pictures(self, x0: Tensor, prompts: Prompts, t: Tensor) -> Tensor:
        self.backbone.evaluations[REWARD_MODEL] += len(x0)
        return self.reward.score(self.backbone.training_pixels(x0), prompts, t)

    def _prompts(self, batch: Batch) -> Prompts:
        return Prompts(batch.texts, batch.cond, batch.null)
