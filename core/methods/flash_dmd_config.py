"""Schema of Flash-DMD's first stage (Chen et al., 2025): DMD2 with three components that can be switched off.

Provenance: [2] second-hand, since the full text was not available. Learning rates, guidance, loss weights and the rate
of the score's average are not published: DMD2's serve, and what its comments say.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.methods.dmd2_config import Dmd2Config
from core.schema import UserError, check_range, register_schema

REVISION = 1


@dataclass
class FlashDmdConfig(Dmd2Config):
    """Flash-DMD. With num_low_noise_steps 0, score_ema_decay 1 and DMD2's critic it is DMD2, bit by bit."""

    name: str = "flash_dmd"
    ttur: int = 2  # 1 and 2 [2]
    # Timestep-aware: of the num_steps, the last ones belong to the critic alone, and the others (999, 749, 499 of four)
    # to the DM term alone [2]; 0: both have all, as in DMD2
    num_low_noise_steps: int = 1
    # Stabilised score estimator: after each update of the student the fake score keeps this share of itself and takes
    # the rest from the student [2]; not published, 0.95 to 0.97 elsewhere [2]; 1: off
    score_ema_decay: float = 0.95
    gan: str = "sam"  # Pixel-GAN [2]
    critic_heads: str = "pooled"  # [2]
    critic_channels: int = 256  # [2]
    adversarial_loss: str = "hinge"  # [2]

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        super().validate()
        check_range("method.num_low_noise_steps", self.num_low_noise_steps, 0, self.num_steps - 1)
        check_range("method.score_ema_decay", self.score_ema_decay, 0.0, 1.0)
        if self.score_ema_decay < 1 and self.fake_score != "network":
            raise UserError(
                f"method.score_ema_decay={self.score_ema_decay:g} moves a network, and method.fake_score="
                f"{self.fake_score} has none; allowed here: 1"
            )


register_schema("method", "flash_dmd", FlashDmdConfig, revision=REVISION)
