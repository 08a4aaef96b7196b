"""Schema of guidance distillation (Meng et al., 2023). Defaults: SD1.5.

Provenance: [P] read in the guide of step and guidance distillation, [C] in LCM's code, [I] ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from core.methods.config_base import TeacherProblem
from core.methods.config_regression import RegressionConfig
from core.schema import check_range, register_schema

REVISION = 1


@dataclass
class GuidanceConfig(RegressionConfig):
    """One pass of the student for two of the guided teacher, at any w of the range: E_w,t omega ||x_student - x_w||^2.

    The student takes w as an input (``backbone.guidance_embedding``). A parent is guided by two passes.
    """

    guidance_input: ClassVar[str] = "must"

    name: str = "guidance"
    guidance_min: float = 1.0  # 1: none [I]
    guidance_max: float = 13.0
    num_timesteps: int = 0  # 0: t is any time [P] | of a grid of so many steps, where the parent knows no others

    @property
    def teacher_problem(self) -> TeacherProblem:
        """The student's inputs, and the guided x0 there."""
        fields = ("teacher", "num_timesteps", "guidance_min", "guidance_max", "prediction", "null_prob")
        return TeacherProblem(fields, calls=1)

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        super().validate()
        check_range("method.num_timesteps", self.num_timesteps, 0)


register_schema("method", "guidance", GuidanceConfig, revision=REVISION)
