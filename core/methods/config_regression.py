"""The settings of methods whose student regresses on an x0 of the teacher: progressive, guidance. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from core.methods.config_base import MethodConfig
from core.schema import UserError, check_choice, check_range, listing

TEACHERS = ("base", "parent")
PREDICTIONS = ("network", "x0", "eps", "v", "flow")
WEIGHTINGS = ("constant", "snr", "truncated_snr", "v")


@dataclass
class RegressionConfig(MethodConfig):
    """weighting(t) ||x_student - x_teacher||^2; a schema adds what x_teacher is."""

    guidance_input: ClassVar[str] = "may"

    teacher: str = "base"  # the backbone as it is | parent: what train.init_from names, from which the student starts
    # w ~ U[min, max] of the teacher, x_w = w x_cond + (1 - w) x_null, and of a student that takes it as an input
    guidance_min: float = 7.5
    guidance_max: float = 7.5
    # The student's output is taken for what its network predicts | x0 | eps | v [P] | flow; a parent's likewise
    prediction: str = "network"
    # Of the squared error of x0: constant | snr | truncated_snr: max(snr, 1) | v: 1 / sigma^2, that of v [P]
    weighting: str = "truncated_snr"
    # Share of samples with the empty prompt in place of their own: a student that is to be guided later needs it [I]
    null_prob: float = 0.0
    student_lr: float = 1e-4  # AdamW, LoRA [I]
    adam_betas: list[float] = listing(0.9, 0.999)
    weight_decay: float = 0.0

    @property
    def teacher_is_parent(self) -> bool:
        """Whether this is a later round of a chain."""
        return self.teacher == "parent"

    @property
    def teacher_guidance(self) -> float:
        """The middle of the range of guidance."""
        return (self.guidance_min + self.guidance_max) / 2

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        check_choice("method.teacher", self.teacher, TEACHERS)
        check_range("method.guidance_max", self.guidance_max, self.guidance_min)
        check_choice("method.prediction", self.prediction, PREDICTIONS)
        check_choice("method.weighting", self.weighting, WEIGHTINGS)
        check_range("method.null_prob", self.null_prob, 0.0, 1.0)
        check_range("method.student_lr", self.student_lr, 0.0)
        check_range("method.weight_decay", self.weight_decay, 0.0)
        if len(self.adam_betas) != 2:
            raise UserError(f"method.adam_betas={self.adam_betas} is not a pair; give two values")
