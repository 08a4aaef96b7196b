"""Adversarial losses on critic logits, by name. Logits are raw, of any shape; losses are scalars."""

from __future__ import annotations

from torch import Tensor


class Lsgan:
    """Least squares (Flash Diffusion, Eq. 8, with its 1/2): real is 1, fake is 0, on raw logits."""

    def generator(self, fake_logits: Tensor) -> Tensor:
        return 0.5 * (fake_logits.float() - 1).square().mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return 0.5 * ((real_logits.float() - 1).square().mean() + fake_logits.float().square().mean())


GAN_LOSSES: dict[str, type[Lsgan]] = {"lsgan": Lsgan}
