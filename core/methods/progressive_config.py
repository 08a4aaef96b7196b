"""Schema of progressive distillation (Salimans & Ho, 2022), one round. Defaults: SD1.5, the first round from 50 steps.

Provenance: [P] read in the guide of step and guidance distillation, [I] ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.methods.config_base import TeacherProblem
from core.methods.config_regression import RegressionConfig
from core.methods.flash_config import ADVERSARIAL_LOSSES
from core.schema import UserError, check_choice, check_range, listing, register_schema

REVISION = 1


@dataclass
class ProgressiveConfig(RegressionConfig):
    """One round: a student of ``student_steps`` goes in one DDIM step where its teacher goes in two.

    A chain of rounds is a chain of runs: each starts from the one before (``train.init_from``), which is its teacher.
    A parent that takes no guidance as an input has that of the rounds before, and is not guided again.
    """

    name: str = "progressive"
    teacher_steps: int = 50  # 50 -> 25 -> 12 -> 8 -> 4 [P]
    student_steps: int = 25  # each is about teacher_steps / student_steps of the teacher's, never fewer than two [I]
    # Of a critic on the teacher's features of re-noised samples and data, as Flash Diffusion has it; 0: none. "Below 4
    # steps adversarial losses are needed" [P], without a recipe
    adversarial_weight: float = 0.0
    adversarial_loss: str = "lsgan"  # lsgan | hinge | wgan | non_saturating | relativistic
    adversarial_timesteps: list[float] = listing(0.01, 0.25, 0.5, 0.75)  # t' as a fraction of T
    critic_lr: float = 1e-4
    critic_channels: int = 64

    @property
    def parts(self) -> int:
        """Steps of the teacher that make one of the student."""
        return max(2, round(self.teacher_steps / self.student_steps))

    @property
    def parent_takes_guidance(self) -> bool:
        """The student of a guidance-distilled parent goes on taking it."""
        return self.teacher_is_parent

    @property
    def teacher_problem(self) -> TeacherProblem:
        """The student's inputs, and the targets that the teacher's steps from them give."""
        fields = (
            "teacher", "teacher_steps", "student_steps", "guidance_min", "guidance_max", "prediction", "null_prob",
        )  # fmt: skip
        return TeacherProblem(fields, calls=self.parts)

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        super().validate()
        check_range("method.student_steps", self.student_steps, 1)
        check_choice("method.adversarial_loss", self.adversarial_loss, ADVERSARIAL_LOSSES)
        check_range("method.critic_channels", self.critic_channels, 1)
        for key in ("adversarial_weight", "critic_lr"):
            check_range(f"method.{key}", getattr(self, key), 0.0)
        for fraction in self.adversarial_timesteps:
            check_range("method.adversarial_timesteps", fraction, 0.0, 0.999)  # t = T does not exist
        if self.teacher_steps <= self.student_steps:
            raise UserError(
                f"method.teacher_steps={self.teacher_steps} is not more than method.student_steps={self.student_steps}"
            )


register_schema("method", "progressive", ProgressiveConfig, revision=REVISION)
