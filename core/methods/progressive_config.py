"""Schema of progressive distillation (Salimans & Ho, 2022), one round. Defaults: SD1.5, the first round from 50 steps.

Provenance: [P] read in the source's guide of step and guidance distillation, [2] the paper as others tell it, [I] ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.methods.config_base import MethodConfig, TeacherProblem
from core.schema import UserError, check_choice, check_range, listing, register_schema

REVISION = 1
TEACHERS = ("base", "parent")
PREDICTIONS = ("network", "x0", "eps", "v", "flow")
WEIGHTINGS = ("constant", "snr", "truncated_snr", "v")


@dataclass
class ProgressiveConfig(MethodConfig):
    """One round: a student of ``student_steps`` goes in one DDIM step where its teacher goes in two.

    A chain of rounds is a chain of runs: each starts from the one before (``train.init_from``), which is its teacher.
    """

    name: str = "progressive"
    teacher: str = "base"  # the backbone as it is, in the first round | parent: what train.init_from names
    teacher_steps: int = 50  # 50 -> 25 -> 12 -> 8 -> 4 [P]
    student_steps: int = 25  # each is about teacher_steps / student_steps of the teacher's, never fewer than two [I]
    # w ~ U[min, max] of the base (x_w = w x_cond + (1 - w) x_null), and of a parent that takes guidance as an input;
    # any other parent has its guidance from the rounds before
    guidance_min: float = 7.5
    guidance_max: float = 7.5
    # The student's output is taken for what its network predicts | x0 | eps | v [P] | flow; a parent's likewise
    prediction: str = "network"
    # Weight of the squared error of x0: constant | snr | truncated_snr: max(snr, 1) | v: 1 / sigma^2, that of v [P]
    weighting: str = "truncated_snr"
    student_lr: float = 1e-4  # AdamW, LoRA [I]
    adam_betas: list[float] = listing(0.9, 0.999)
    weight_decay: float = 0.0

    @property
    def teacher_is_parent(self) -> bool:
        """Whether this is a later round of a chain."""
        return self.teacher == "parent"

    @property
    def parts(self) -> int:
        """Steps of the teacher that make one of the student."""
        return max(2, round(self.teacher_steps / self.student_steps))

    @property
    def teacher_guidance(self) -> float:
        """The middle of the range of guidance."""
        return (self.guidance_min + self.guidance_max) / 2

    @property
    def teacher_problem(self) -> TeacherProblem:
        """The student's inputs, and the targets that the teacher's steps from them give."""
        fields = ("teacher", "teacher_steps", "student_steps", "guidance_min", "guidance_max", "prediction")
        return TeacherProblem(fields, calls=self.parts)

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        check_choice("method.teacher", self.teacher, TEACHERS)
        check_range("method.student_steps", self.student_steps, 1)
        if self.teacher_steps <= self.student_steps:
            raise UserError(
                f"method.teacher_steps={self.teacher_steps} is not more than method.student_steps={self.student_steps}"
            )
        check_range("method.guidance_max", self.guidance_max, self.guidance_min)
        check_choice("method.prediction", self.prediction, PREDICTIONS)
        check_choice("method.weighting", self.weighting, WEIGHTINGS)
        check_range("method.student_lr", self.student_lr, 0.0)
        check_range("method.weight_decay", self.weight_decay, 0.0)
        if len(self.adam_betas) != 2:
            raise UserError(f"method.adam_betas={self.adam_betas} is not a pair; give two values")


register_schema("method", "progressive", ProgressiveConfig, revision=REVISION)
