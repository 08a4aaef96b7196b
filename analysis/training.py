"""Cost and steadiness of a training, from its run's logs: numbers that no judge measures and no split has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.collect import CellRun
from analysis.stats import summarize
from core import catalogue
from core.metrics.cost import training_cost
from core.run import Run


def teacher_evaluations(run: Run) -> float:
    """The teacher's network evaluations per training image, those that a store has saved included."""
    cost = training_cost(run.metrics())
    return (cost.evaluations.get("teacher", 0) + cost.stored) / cost.images if cost.images else math.nan


def student_evaluations(run: Run) -> float:
    """The student's network evaluations per training image."""
    cost = training_cost(run.metrics())
    return cost.evaluations.get("student", 0) / cost.images if cost.images else math.nan


def gradient_variation(run: Run) -> float:
    """Standard deviation over mean of the student's logged gradient norms, second half of the training."""
    values = logged(run, "student/grad_norm")
    return variation(values[len(values) // 2 :])


def loss_variation(run: Run) -> float:
    """The same of the student's distribution matching loss, of equally many samples in each mean."""
    points = equal_means(run, "student/dmd")
    return variation([value for at, value in points if at > 0.5])


def equal_means(run: Run, key: str) -> list[tuple[float, float]]:
    """(fraction of the student's images, mean of ``key``), each over as many student images as a line has samples.

    A line of the log is a mean over the student's updates since the line before: with a ratio of 10:1 over a tenth of
    those with 1:1, which alone would make it vary three times as much.
    """
    log = pd.DataFrame([line for line in run.metrics() if line.get(key) is not None])
    if log.empty:
        return []
    log = log.drop_duplicates("images", keep="last")
    samples, weight = np.diff(log["images"], prepend=0), np.diff(log["student_images"], prepend=0)
    size = float(np.median(samples))
    part = np.ceil(log["student_images"] / size)
    sums = pd.DataFrame({"weight": weight, "value": weight * log[key]}).groupby(part.to_numpy()).sum()
    sums = sums[sums["weight"] > size / 2]  # the last one may be short
    whole = log["student_images"].iloc[-1] / size
    return [((at - 0.5) / whole, row["value"] / row["weight"]) for at, row in sums.iterrows()]


def logged(run: Run, key: str) -> list[float]:
    """The values that the log has of ``key``, in the order of training."""
    return [line[key] for line in run.metrics() if line.get(key) is not None]


def variation(values: Sequence[float]) -> float:
    """Standard deviation over mean."""
    found = summarize(values)
    return found.sd / found.mean if found.mean else math.nan


def trainable_parameters(run: Run) -> float:
    """The parameters of all players together."""
    counts = run.noted("trainable_parameters")
    return math.nan if counts is None else float(sum(counts.values()))


def device_hours(run: Run) -> float:
    """The hours of training alone; solutions that another run had stored were free."""
    cost = training_cost(run.metrics())
    return cost.device_hours if cost.images else math.nan


TRAINING: Mapping[str, Callable[[Run], float]] = {
    catalogue.TEACHER_EVALUATIONS.name: teacher_evaluations,
    catalogue.STUDENT_EVALUATIONS.name: student_evaluations,
    catalogue.GRADIENT_VARIATION.name: gradient_variation,
    catalogue.LOSS_VARIATION.name: loss_variation,
    catalogue.TRAINABLE_PARAMETERS.name: trainable_parameters,
    catalogue.DEVICE_HOURS.name: device_hours,
}


def by_seed(items: Sequence[CellRun], row: str, metric: str) -> dict[int, float]:
    """``metric`` of the finished runs of ``row``; a seed whose log does not know it is left out."""
    runs = {item.cell.seed: item.first.run for item in items if item.cell.row == row and item.state == "done"}
    found = {seed: TRAINING[metric](run) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}
