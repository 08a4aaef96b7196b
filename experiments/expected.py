"""The values that an experiment should reach, compared with those that a run of it has reached. Torch-free.

The experiment's file says what is expected (``expected:``), as it is today: a run does not carry it in its id.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.catalogue import METRICS
from core.config import ExpectedConfig, ExperimentConfig, UserError, compose, identity_dict
from core.run import Run

REACHED, MISSED, UNMEASURED = "reached", "not reached", "not measured"
DEVIATIONS = 3  # a new seed lies within three sd of the mean of three, if no tolerance is stated
MOST_NAMED = 3
# What differs without making another experiment of it
SAME_EXPERIMENT = ("seed", "backbone.weights_hash", "data.data_hash", "data.name", "train.parent")


@dataclass(frozen=True)
class Outcome:
    """An expected value, the verdict on a run, and both numbers in words."""

    expected: ExpectedConfig
    verdict: str
    detail: str

    @property
    def name(self) -> str:
        return f"{self.expected.metric} {self.expected.split} {self.expected.steps}"


def outcomes(run: Run) -> list[Outcome]:
    """Every value that the file of a run's experiment expects, with a verdict; none without such a file."""
    try:
        experiment = compose(run.config.name)
    except UserError:
        return []
    changed = changed_settings(run.config, experiment)
    return [_outcome(expected, run, changed) for expected in experiment.expected]


def _outcome(expected: ExpectedConfig, run: Run, changed: list[str]) -> Outcome:
    wanted = _shown(expected)
    line = _measured(expected, run)
    if line is None:
        return Outcome(expected, UNMEASURED, wanted)
    if line["n"] != expected.num_images:
        other = f"{line['value']:.4g} on {line['n']:,} images cannot be compared with {wanted}"
        return Outcome(expected, UNMEASURED, f"{other} on {expected.num_images:,}")
    reached = shortfall(expected, line["value"]) <= margin(expected)
    numbers = f"{line['value']:.4g}, {wanted}"
    if changed and not reached:
        numbers += f"; the run differs from the experiment in {_named(changed)}"
    return Outcome(expected, REACHED if reached else MISSED, numbers)


def _measured(expected: ExpectedConfig, run: Run) -> dict[str, Any] | None:
    """The run's own value after most training, at the weights that it evaluates."""
    found = None
    key = (expected.metric, expected.split, expected.steps, _weights(run.config))
    for line in run.evals():
        same = (line["metric"], line["split"], line["steps"], line["weights"]) == key
        if same and (found is None or line["images"] >= found["images"]):
            found = line
    return found


def _weights(config: ExperimentConfig) -> str:
    return config.eval.weights if config.method.trains else "teacher"


def margin(expected: ExpectedConfig) -> float:
    """By how much a run may fall short."""
    return expected.tolerance or DEVIATIONS * expected.sd


def shortfall(expected: ExpectedConfig, value: float) -> float:
    """By how much ``value`` is worse than expected; negative for a better one."""
    beyond = value - expected.value
    better = METRICS[expected.metric].better if expected.metric in METRICS else ""
    return {"min": beyond, "max": -beyond, "": abs(beyond)}[better]


def _shown(expected: ExpectedConfig) -> str:
    allowed = f" ± {margin(expected):.2g}" if margin(expected) else ""
    source = f"{expected.source}, {expected.seeds} seeds" if expected.seeds > 1 else expected.source
    return f"expected {expected.value:.4g}{allowed} ({source})"


def _named(names: list[str]) -> str:
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def changed_settings(config: ExperimentConfig, experiment: ExperimentConfig) -> list[str]:
    """Settings that decide what is computed and differ from the experiment's file, seed and data apart."""
    ours, theirs = dict(_leaves(identity_dict(config))), dict(_leaves(identity_dict(experiment)))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return [name for name in names if name not in SAME_EXPERIMENT]


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
