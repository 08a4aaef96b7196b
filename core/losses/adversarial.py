"""Adversarial losses on critic logits, by name. Logits are raw, of any shape; losses are scalars."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor


class GanLoss(ABC):
    """The two sides of one game. ``weight_clip`` bounds the critic's weights after each of its updates.

    ``paired``: the student's side reads the real latents' logits too; logit i of both has one caption, t', and noise.
    """

    weight_clip: ClassVar[float | None] = None
    paired: ClassVar[bool] = False

    @abstractmethod
    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """The loss that the student minimises."""

    @abstractmethod
    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The loss that the critic minimises."""


class Lsgan(GanLoss):
    """Least squares (Flash Diffusion, Eq. 8, with its 1/2): real is 1, fake is 0, on raw logits."""

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return 0.5 * (fake_logits.float() - 1).square().mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return 0.5 * ((real_logits.float() - 1).square().mean() + fake_logits.float().square().mean())


class Hinge(GanLoss):
    """Hinge loss (Lim & Ye, 2017): only logits inside the margins -1 and 1 move the critic."""

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -fake_logits.float().mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()


class Wgan(GanLoss):
    """Wasserstein loss (Arjovsky et al., 2017) with clipped weights (0.01 as in Flash Diffusion's release)."""

    weight_clip = 0.01

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -fake_logits.float().mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return fake_logits.float().mean() - real_logits.float().mean()


class NonSaturating(GanLoss):
    """Non-saturating loss (Goodfellow et al., 2014): -log D(fake), where softplus(-x) = -log sigmoid(x)."""

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return F.softplus(-fake_logits.float()).mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


class Relativistic(GanLoss):
    """Relativistic loss (Jolicoeur-Martineau, 2018): only the difference within a pair counts, not what both share."""

    paired = True

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return F.softplus(real_logits.float() - fake_logits.float()).mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return F.softplus(fake_logits.float() - real_logits.float()).mean()


GAN_LOSSES: dict[str, type[GanLoss]] = {
    "lsgan": Lsgan,
    "hinge": Hinge,
    "wgan": Wgan,
    "non_saturating": NonSaturating,
    "relativistic": Relativistic,
}
