"""Costs: of a training, read from its metrics.jsonl lines, and of drawing pictures, counted meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SamplingCost:
    """The cost of drawing ``images`` pictures: network evaluations of single samples by role, as they were counted."""

    images: int
    evaluations: Mapping[str, int]

    @property
    def nfe(self) -> int | float:
        """Network evaluations for one picture; a whole number is an int, as records hold it."""
        each = sum(self.evaluations.values()) / self.images
        return int(each) if each.is_integer() else each

    def __add__(self, other: SamplingCost) -> SamplingCost:
        evaluations = Counter(self.evaluations) + Counter(other.evaluations)
        return SamplingCost(self.images + other.images, evaluations)


@dataclass(frozen=True)
class TrainingCost:
    """``evaluations`` counts single-sample network passes by role; ``images`` were seen by the student."""

    images: int
    device_hours: float
    evaluations: dict[str, int]
    stored: int = 0  # teacher evaluations that a store of solutions has saved

    @property
    def total_evaluations(self) -> int:
        return sum(self.evaluations.values())


def training_cost(metrics: Sequence[dict[str, Any]]) -> TrainingCost:
    """The cost at the newest line: all its counters are totals over the run and survive a resume."""
    if not metrics:
        return TrainingCost(0, 0.0, {})
    last = max(metrics, key=lambda line: line["images"])
    stored = int(last.get("stored_evaluations", 0))
    return TrainingCost(int(last["images"]), float(last["device_hours"]), dict(last["evaluations"]), stored)


def amount(line: Mapping[str, Any], unit: str) -> int:
    """Progress at a line of metrics.jsonl in the unit of a budget: images, iterations or evaluations."""
    if unit == "evaluations":
        return sum(line["evaluations"].values()) + line.get("stored_evaluations", 0)
    return line["iteration"] if unit == "iterations" else line.get("student_images", line["images"])
