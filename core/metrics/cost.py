"""What a run cost: device-hours and network evaluations by role, read from its metrics.jsonl lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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
