"""Contradictions inside a run folder: what its files say of one another, whoever wrote them. Torch-free."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.catalogue import METRICS
from core.metrics.protocol import Protocol
from core.run import KEY, Run

RISING = ("iteration", "images", "student_images", "seconds", "device_hours")  # of a log, within a training
SAME = {"metric": "metric", "split": "split", "n": "num_images", "steps": "steps", "guidance": "guidance"}
Line = Mapping[str, Any]


def wrong_numbers(run: Run) -> Iterator[str]:
    """Name what is wrong with ``evals.jsonl``, in words."""
    lines, torn = _lines(run.path / "evals.jsonl")
    if torn:
        yield f"line {torn} is no number"
    problems = (_problem(line, run) for line in lines)
    broken = [problem for problem in problems if problem]
    yield from broken
    if not broken:
        yield from _repeated(lines)
        yield from _missing(run, lines)


def _repeated(lines: list[Line]) -> Iterator[str]:
    """Each number that stands there more than once."""
    counted = Counter(tuple(line[key] for key in KEY) for line in lines)
    for (metric, split, *_), count in counted.items():
        if count > 1:
            yield f"{metric} on {split} stands there {count} times"


def _problem(line: Line, run: Run) -> str:
    """Why one number cannot be what it says; empty for a sound one."""
    reason = _reason(line, run)
    return f"{line.get('metric')} on {line.get('split')}: {reason}" if reason else ""


def _reason(line: Line, run: Run) -> str:
    try:
        fields, value = line["protocol_fields"], line["value"]
        identity = Protocol(**fields).id
    except (KeyError, TypeError):
        return "its protocol is damaged"
    if line.get("run") != run.id:
        return f"it is of run {line.get('run')}"
    if identity != line.get("protocol"):
        return "its protocol's id is not the hash of the protocol"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return f"its value is {value}"
    if fields["data_hash"] != run.config.data.data_hash:
        return f"its data are {fields['data_hash']}, the run's {run.config.data.data_hash}"
    differing = [f"{outer} {line.get(outer)}" for outer, inner in SAME.items() if line.get(outer) != fields.get(inner)]
    return f"{', '.join(differing)} is not what its protocol says" if differing else ""


def _missing(run: Run, lines: list[Line]) -> Iterator[str]:
    """Each number that the configuration asks for at the end of the training, and that is not there."""
    config, last = run.config.eval, max((line["images"] for line in lines), default=0)
    have = set()
    for line in lines:
        if line["images"] == last:
            # How many texts of a split are different is the data's
            count = None if METRICS[line["metric"]].grouped else line["n"]
            have.add((line["metric"], line["split"], line["steps"], line["weights"], count))
    for name, split, setting in itertools.product(config.metrics, config.splits, run.config.settings()):
        steps, count = setting.sampler.steps, None if METRICS[name].grouped else config.num_images
        if (name, split, steps, setting.weights, count) not in have:
            yield f"{name} on {split} at {steps} steps of {config.num_images} images is missing"


def wrong_log(run: Run) -> Iterator[str]:
    """Name what is wrong with ``metrics.jsonl``: lines that are none, unknown numbers, totals that fall."""
    lines, torn = _lines(run.path / "metrics.jsonl")
    if torn:
        yield f"line {torn} of the log is no line of one"
    totals = [_totals(line) for line in lines]
    for before, after in itertools.pairwise(totals):
        yield from _falls(before, after)
    for line in lines:
        yield from _unknown(line)


def _unknown(line: Line) -> Iterator[str]:
    for key, value in line.items():
        if value is None or value != value:
            yield f"{key} is {value}"


def _falls(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    for key in before:
        if after.get(key, -math.inf) < before[key]:
            yield f"{key} falls from {before[key]} to {after.get(key)}"


def _totals(line: Line) -> dict[str, float]:
    """The numbers of a line that can only rise."""
    return {key: line[key] for key in RISING if key in line} | dict(line.get("evaluations", {}))


def wrong_origin(run: Run) -> Iterator[str]:
    """Name the hashes of weights and data in the provenance that are not those of the configuration."""
    facts, config = run.provenance(), run.config
    for name, stored in (("weights_hash", config.backbone.weights_hash), ("data_hash", config.data.data_hash)):
        if facts.get(name, stored) != stored:
            yield f"{name} {facts[name]} beside {stored} of the configuration"


def _lines(path: Path) -> tuple[list[Line], int]:
    """The lines of a file, and the number (from 1) of the first that is none; 0 where all are."""
    out, torn = [], 0
    if not path.exists():
        return out, torn
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            out.append(line)
        else:
            torn = torn or number
    return out, torn
