"""The adversarial term on features of the frozen teacher's encoder half, of every method that has one.

Student samples and data are re-noised alike; a small head on the teacher's bottleneck tells one from the other (Flash
Diffusion, Sec. 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from core.backbones.roles import keyed_init
from core.critics.latent import LatentCritic
from core.data.batches import Batch
from core.losses.adversarial import GAN_LOSSES
from core.methods.base import Method, Optimizer, Player, Rollout, draw

CRITIC = "critic"


@dataclass
class GanRollout(Rollout):
    """A rollout with features that both turns read."""

    real_features: Tensor | None = field(default=None, kw_only=True)
    fake_features: Tensor | None = field(default=None, kw_only=True)


class LatentGan:
    """A critic for ``method``: its player, and the losses of both sides; ``timesteps`` are fractions t' of T."""

    def __init__(self, method: Method, loss: str, channels: int, timesteps: Sequence[float]) -> None:
        self.method, self.timesteps, self.loss = method, timesteps, GAN_LOSSES[loss]()
        with keyed_init(method.seed, CRITIC):
            self.critic = LatentCritic(method.backbone.feature_shape, channels)

    def player(self, lr: float, betas: tuple[float, float], weight_decay: float) -> Player:
        """The player that steps the critic."""
        optimizer = Optimizer(lr, betas, weight_decay, self.loss.weight_clip)
        return Player(CRITIC, dict(self.critic.named_parameters()), optimizer)

    def student_loss(self, x0: Tensor, rollout: GanRollout) -> Tensor:
        """The student's side, with a graph through ``x0``."""
        features = self._features(x0, rollout.batch)
        rollout.fake_features = features.detach()
        real = self.critic(self._real_features(rollout)) if self.loss.paired else None
        return self.loss.generator(self.critic(features), real)

    def critic_loss(self, rollout: GanRollout) -> Tensor:
        """The critic's side (Eq. 8); the fake features of the student's turn serve again, detached."""
        real = self._real_features(rollout)
        with torch.no_grad():
            fake = rollout.fake_features
            if fake is None:
                fake = self._features(rollout.samples, rollout.batch)
        return self.loss.discriminator(self.critic(real), self.critic(fake))

    def _features(self, x0: Tensor, batch: Batch) -> Tensor:
        """Teacher features of re-noised latents; fake and real share t' and the noise of their position."""
        method, fractions, p = self.method, np.asarray(self.timesteps), batch.positions
        choice = method.stream(CRITIC, "timestep").integers(p, 0, len(fractions))
        t = method.backbone.process.timestep(draw(fractions[choice], x0))
        noise = draw(method.stream(CRITIC, "noise").normal(p, x0.shape[1:]), x0)
        x_t = method.backbone.process.add_noise(x0, noise, t)
        return method.backbone.features(method.teacher, x_t, t, batch.cond)

    def _real_features(self, rollout: GanRollout) -> Tensor:
        """Teacher features of the data's latents, computed once for both turns."""
        batch = rollout.batch
        if rollout.real_features is None:
            features, saved = self.method.once(
                "real features",
                self.timesteps,
                batch.positions,
                lambda: self._features(batch.x0, batch),
                cost=len(batch.positions),
            )
            rollout.real_features, rollout.stored = features, rollout.stored + saved
        return rollout.real_features
