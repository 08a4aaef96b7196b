"""Settings of the RL turn, which methods of a few-step student have as their part ``rl``. Torch-free.

Provenance: [P] in Flash-DMD, [2] in neighbouring methods' (PSO, SPO, LPO), [I] ours: the paper does not say.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.methods.config_base import WeightFile
from core.rewards.known import KNOWN_REWARDS, OFF
from core.schema import UserError, check_choice, check_range, execution

OBJECTIVES = ("preference", "reward_gradient")
NOISES = ("high", "all")


@dataclass
class RlConfig:
    """Preference optimisation on the student's own transitions, beside its distillation. Off by default."""

    reward: str = OFF  # what is maximised: off | one of core/rewards/known.py
    reward_path: str | None = execution(None)  # folder of its weights
    reward_hash: str = ""  # of that folder; filled in
    # preference: best and worst of several next states [P] | reward_gradient: the reward's own gradient at the
    # student's x0 (ReFL, a baseline)
    objective: str = "preference"
    weight: float = 1.0  # of the loss of its turn
    # Turns of RL that follow one of distillation: the student's turns are dealt out in this ratio [P: 5 is best]
    ratio: int = 5
    distil: bool = True  # False: RL alone, without the distillation that keeps it from hacking the reward (a baseline)
    noise: str = "high"  # steps of the sampler that pairs begin at: those of t above T/2 [P] | all that draw noise
    num_candidates: int = 4  # next states drawn from one x_t [P]
    beta: float = 50.0  # [2] 50 (PSO) to 500 (LPO), with densities averaged over dimensions
    mean_density: bool = True  # log densities are means over dimensions [2], not their sums
    clamp: float = 0.1  # ratios p / p_ref stay within 1 - clamp and 1 + clamp [2]; 0: they are free
    min_gap: float = 0.0  # of the rewards of best and worst; a closer pair teaches nothing
    # The run ends, as one that diverged, when the student's x0 is farther from its reference's than this (mean squared
    # distance over a log interval): rewards that are hacked lie there; 0: anywhere is allowed [I]
    max_distance: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether the student has turns of RL."""
        return self.reward != OFF and self.weight > 0

    @property
    def is_alone(self) -> bool:
        """Whether it has no others."""
        return self.is_on and not self.distil

    @property
    def weight_files(self) -> tuple[WeightFile, ...]:
        """The reward model's folder."""
        row = KNOWN_REWARDS.get(self.reward)
        if not self.is_on or row is None or not row.file:
            return ()
        return (WeightFile("rl.reward_path", "rl.reward_hash", "", row.needed(), row.file),)

    def validate(self, num_steps: int = 2) -> None:
        """Raise UserError for the first value that is not allowed, for a student of ``num_steps`` steps."""
        check_choice("method.rl.reward", self.reward, (OFF, *KNOWN_REWARDS))
        check_choice("method.rl.objective", self.objective, OBJECTIVES)
        check_choice("method.rl.noise", self.noise, NOISES)
        check_range("method.rl.weight", self.weight, 0.0)
        check_range("method.rl.ratio", self.ratio, 1)
        check_range("method.rl.num_candidates", self.num_candidates, 2)
        check_range("method.rl.beta", self.beta, 0.0)
        check_range("method.rl.clamp", self.clamp, 0.0, 0.99)
        check_range("method.rl.min_gap", self.min_gap, 0.0)
        check_range("method.rl.max_distance", self.max_distance, 0.0)
        if self.is_on and num_steps < 2:
            raise UserError(
                f"method.num_steps={num_steps} draws no next state, between which method.rl.reward={self.reward} could "
                "prefer; give at least 2 steps"
            )
