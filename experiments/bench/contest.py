"""Ours against a reference: both in turn in one process, and the evaluations of ours alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from experiments.bench.recorder import Recorder
from experiments.bench.step import per_image
from experiments.bench.timing import spread, timed


@dataclass
class Side:
    """A party that does the work: ``run`` takes the number of the repeat; ``evaluations`` it made in total."""

    run: Callable[[int], object]
    evaluations: Counter[str]


@dataclass
class Duel:
    """Ours and the reference; ``recorder`` repeats the evaluations of our step without what is around them."""

    ours: Side
    reference: Side
    images: int
    device: torch.device
    recorder: Recorder | None = None
    dtype: str = "fp32"  # of the products


def shares(seconds: Counter[str], efficiency: float) -> dict[str, float]:
    """Shares of our step's time: its evaluations by role, and what is beside them."""
    total = seconds.total()
    found = {kind: efficiency * part / total for kind, part in seconds.most_common()}
    return found | {"beside the networks": max(0.0, 1 - efficiency)}


def contest(duel: Duel, repeats: int) -> dict[str, Any]:
    """The ratio of images/s with its spread, and both sides' evaluations; after one round to warm up."""
    sides = {"ours": duel.ours, "reference": duel.reference}
    seconds: dict[str, list[float]] = {"ours": [], "reference": [], "alone": []}
    counted = {name: Counter(side.evaluations) for name, side in sides.items()}
    for repeat in range(repeats + 1):
        for name in sorted(sides, reverse=bool(repeat % 2)):  # who begins changes
            seconds[name].append(timed(partial(sides[name].run, repeat), duel.device))
        if duel.recorder is not None:
            seconds["alone"].append(timed(duel.recorder.replay, duel.device))
    ours, reference, alone = (seconds[name][1:] for name in ("ours", "reference", "alone"))
    found: dict[str, Any] = {"ratio": spread([theirs / own for theirs, own in zip(reference, ours, strict=True)])}
    if duel.recorder is not None:
        found["efficiency"] = spread([network / own for network, own in zip(alone, ours, strict=True)])
        found["time"] = shares(duel.recorder.seconds(), found["efficiency"]["median"])
    for name, side in sides.items():
        made = side.evaluations - counted[name]
        found[name] = {
            "images_per_s": duel.images / median(seconds[name][1:]),
            "evaluations_per_image": per_image(made, duel.images * (repeats + 1)),
        }
    return found
