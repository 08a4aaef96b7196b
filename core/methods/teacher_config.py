"""Schema of the teacher itself as a method: nothing is trained; students are compared to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from core.methods.config_base import MethodConfig
from core.sampler import Sampler
from core.schema import check_choice, check_range, register_schema

REVISION = 1


@dataclass
class TeacherConfig(MethodConfig):
    """No training: the frozen teacher sampled with an ODE solver."""

    trains: ClassVar[bool] = False

    name: str = "teacher"
    solver: str = "dpmpp_2m"  # dpmpp_2m | ddim | unipc
    steps: int = 50  # solver steps; each costs two network evaluations when guided
    guidance: float = 7.5  # w in x_w = w x_cond + (1 - w) x_null; 1: none

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        check_choice("method.solver", self.solver, ("dpmpp_2m", "ddim", "unipc"))
        check_range("method.steps", self.steps, 1)

    def sampler(self) -> Sampler:
        """The settings above as one object."""
        return Sampler(self.solver, self.steps, float(self.guidance))


register_schema("method", "teacher", TeacherConfig, revision=REVISION)
