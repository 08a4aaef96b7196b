"""Ours against a reference: both in turn in one process, and the evaluations of ours alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from experiments.bench.step import per_image
from experiments.bench.timing import spread, timed


@dataclass
class Side:
    """One of two that do the same work: ``run`` takes the number of the repeat; ``evaluations`` it made in total."""

    run: Callable[[int], object]
    evaluations: Counter[str]


@dataclass
class Duel:
    """Ours, the reference, and ``replay``: the evaluations of our step alone, without what is around them."""

    ours: Side
    reference: Side
    replay: Callable[[], None] | None
    images: int
    device: torch.device


def contest(duel: Duel, repeats: int) -> dict[str, Any]:
    """The ratio of images/s with its spread, and both sides' evaluations; after one round to warm up."""
    sides = {"ours": duel.ours, "reference": duel.reference}
    seconds: dict[str, list[float]] = {"ours": [], "reference": [], "alone": []}
    counted = {name: Counter(side.evaluations) for name, side in sides.items()}
    for repeat in range(repeats + 1):
        for name in sorted(sides, reverse=bool(repeat % 2)):  # who begins changes
            seconds[name].append(timed(partial(sides[name].run, repeat), duel.device))
        if duel.replay is not None:
            seconds["alone"].append(timed(duel.replay, duel.device))
    ours, reference, alone = (seconds[name][1:] for name in ("ours", "reference", "alone"))
    found: dict[str, Any] = {"ratio": spread([theirs / own for theirs, own in zip(reference, ours, strict=True)])}
    if alone:
        found["efficiency"] = spread([network / own for network, own in zip(alone, ours, strict=True)])
    for name, side in sides.items():
        made = side.evaluations - counted[name]
        found[name] = {
            "images_per_s": duel.images / median(seconds[name][1:]),
            "evaluations_per_image": per_image(made, duel.images * (repeats + 1)),
        }
    return found
