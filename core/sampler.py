"""How samples are drawn from a network: one object for configurations, sessions, protocols and tables. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FEW_STEP_SOLVERS = ("lcm", "ddim")
CACHES = ("none",)
TEACHER_SOLVER = "dpmpp_2m"  # of the teacher's pictures beside a student's


@dataclass(frozen=True)
class Sampler:
    """How one network turns noise into samples.

    ``solver`` is an ODE solver of the teacher (dpmpp_2m, ddim, unipc) or a few-step solver of a student (lcm, ddim).
    ``guidance`` is w in x_w = w x_cond + (1 - w) x_null; 1 is the network as it is. ``eta`` is the share of new noise
    in a student's ddim, from 0 (none) to 1 (as DDPM). ``cache`` is a training-free way to use what the network computed
    at earlier steps again; there is none yet.
    """

    solver: str
    steps: int
    guidance: float = 1.0
    eta: float = 0.0
    cache: str = "none"

    def __post_init__(self) -> None:
        assert self.cache in CACHES, self.cache

    @property
    def name(self) -> str:
        """The solver as a protocol names it: lcm, ddim, ddim eta=0.3."""
        return f"{self.solver} eta={self.eta:g}" if self.eta else self.solver

    def protocol_fields(self) -> dict[str, Any]:
        """The arguments of ``Protocol`` that say how samples were drawn."""
        return {"solver": self.name, "steps": self.steps, "guidance": self.guidance, "cache": self.cache}


@dataclass(frozen=True)
class Setting:
    """A network and how its samples are drawn; ``weights``: teacher, student, or ema (the student's average)."""

    weights: str
    sampler: Sampler

    @property
    def label(self) -> str:
        """The heading of a column of pictures: ``teacher 50 steps w=4``, ``student 1 step``."""
        steps, guidance = self.sampler.steps, self.sampler.guidance
        plural = "s" if steps > 1 else ""
        suffix = "" if guidance == 1.0 else f" w={guidance:g}"
        return f"{self.weights} {steps} step{plural}{suffix}"


def teacher_setting(steps: int, guidance: float) -> Setting:
    """The teacher as it is drawn and timed beside its student."""
    return Setting("teacher", Sampler(TEACHER_SOLVER, steps, guidance))
