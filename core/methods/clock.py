"""Progress of a run, counted in samples; the budget's unit is one of three axes, and logs carry all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.diffusion.timesteps import stage_at

UNITS = ("images", "iterations", "evaluations")


@dataclass
class Clock:
    """``images`` counts the samples drawn, one batch an iteration, and is every sample's position; ``student_images``
    those of iterations in which the student had its turn. Stage boundaries are fractions of the budget.

    ``evaluations`` are the network evaluations that the method asked for, by role. Teacher solutions read from the
    store count too (``stored``): whether a store is used is execution, and must not move a schedule. ``ahead`` are
    evaluations spent on problems of later iterations, which are read from the store when their turn comes.
    """

    budget: int
    unit: str = "images"
    batch_size: int = 1
    iteration: int = 0
    images: int = 0
    student_images: int = 0
    evaluations: Counter[str] = field(default_factory=Counter)
    stored: int = 0
    ahead: int = 0
    seconds: float = 0.0

    @property
    def amount(self) -> int:
        """Progress in the budget's own unit."""
        if self.unit == "evaluations":
            return sum(self.evaluations.values()) + self.stored
        return self.student_images if self.unit == "images" else self.iteration

    @property
    def fraction(self) -> float:
        """Progress in [0, 1]."""
        return min(self.amount / self.budget, 1.0) if self.budget else 1.0

    @property
    def done(self) -> bool:
        return self.amount >= self.budget

    def stage(self, num_stages: int) -> int:
        """Index of the current stage of equal length, 0..num_stages-1."""
        return stage_at(self.fraction, num_stages)

    def positions(self) -> np.ndarray:
        """Global indices of the samples of this iteration, int64 (batch_size,)."""
        return np.arange(self.images, self.images + self.batch_size, dtype=np.int64)

    def spend_ahead(self, evaluations: int) -> None:
        """Count network evaluations spent on problems of later iterations."""
        self.ahead += evaluations

    def save_stored(self, evaluations: int) -> None:
        """Count network evaluations that stored teacher solutions have saved."""
        self.stored += evaluations

    def advance(self, *, student: bool = True) -> None:
        """The iteration is over; ``student``: it had a turn of the student (or of who learns in its place)."""
        self.iteration += 1
        self.images += self.batch_size
        self.student_images += self.batch_size * student

    def counters(self, total: Callable[[Mapping[str, float]], Mapping[str, float]] = dict) -> dict[str, Any]:
        """The counts of each process on its own: evaluations by role, stored, ahead, seconds; summed by ``total``."""
        own = {"stored": self.stored, "ahead": self.ahead, "seconds": self.seconds}
        sums = total(own | {f"role {role}": count for role, count in self.evaluations.items()})
        roles = {name.removeprefix("role "): count for name, count in sums.items() if name.startswith("role ")}
        return {"evaluations": roles, **{name: sums[name] for name in own}}

    def state(self, total: Callable[[Mapping[str, float]], Mapping[str, float]] = dict) -> dict[str, Any]:
        position = {"iteration": self.iteration, "images": self.images, "student_images": self.student_images}
        return position | self.counters(total)

    def load_state(self, state: dict[str, Any], *, counts: bool = True) -> None:
        """``counts``: whether this process goes on with the sums of all; the others begin at zero."""
        self.iteration, self.images = state["iteration"], state["images"]
        self.student_images = state.get("student_images", self.images)  # older states: a turn in each iteration
        if not counts:
            return
        self.evaluations = Counter(state["evaluations"])
        self.stored, self.ahead, self.seconds = state["stored"], state["ahead"], state["seconds"]
