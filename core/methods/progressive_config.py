"""Schema of progressive distillation (Salimans & Ho, 2022), one round. Defaults: SD1.5, the first round from 50 steps.

Provenance: [P] read in the guide of step and guidance distillation, [I] ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.methods.config_base import TeacherProblem
from core.methods.config_regression import RegressionConfig
from core.schema import UserError, check_range, register_schema

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
        if self.teacher_steps <= self.student_steps:
            raise UserError(
                f"method.teacher_steps={self.teacher_steps} is not more than method.student_steps={self.student_steps}"
            )


register_schema("method", "progressive", ProgressiveConfig, revision=REVISION)
