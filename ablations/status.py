"""The status of a grid's cells (done, running, to do, and why), from run folders alone. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.grid import Cell
from core.config import ExperimentConfig
from core.run import Run, find_runs
from core.sampler import Sampler

FINAL = ("done", "diverged")  # a diverged run is a result
STALE_S = 90.0  # a heartbeat that is older is told with its age


@dataclass(frozen=True)
class Status:
    """Everything that is known of a cell without asking a cluster.

    ``state`` is the run's, but ``trained`` while numbers that the grid asks for are missing.
    """

    cell: Cell
    state: str
    path: Path | None
    reason: str = ""

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


def statuses(cells: Iterable[Cell], runs_dir: Path) -> list[Status]:
    """One status for every distinct cell (by its key), in the order of ``cells``."""
    distinct = {cell.key: cell for cell in reversed(list(cells))}
    found = {path.name.rpartition("-")[2]: path for path in find_runs(runs_dir)}
    return [status_of(cell, found.get(cell.id)) for cell in reversed(distinct.values())]


def status_of(cell: Cell, path: Path | None) -> Status:
    """The status of one cell whose run, if there is one, lies at ``path``."""
    if path is None:
        return Status(cell, "planned", None)
    run = Run.open(path)
    state = run.state()
    if state == "done" and (missing := list(missing_numbers(run, cell.config))):
        reason = f"{len(missing)} numbers to measure, first: {' '.join(missing[0])}"
        return Status(cell, "trained", path, reason)
    return Status(cell, state, path, run.reason() if state == "failed" else "")


def progress_of(path: Path | None) -> str:
    """The run's last heartbeat as text, with its age when that is old; empty without one."""
    if path is None:
        return ""
    run = Run.open(path)
    beat = run.last_heartbeat()
    if beat is None:
        return ""
    age = time.time() - beat["time"]
    return run.progress() + (f"  ({age:.0f} s ago)" if age > STALE_S else "")


def missing_numbers(run: Run, config: ExperimentConfig) -> Iterator[tuple[str, str, str]]:
    """(metric, split, steps) that ``config`` asks for at the end of its budget and that evals.jsonl lacks."""
    have = set(_numbers_at_the_end(run, config))
    for split in config.eval.splits:
        for setting in config.settings():
            steps = setting.sampler.steps
            for metric in config.eval.metrics:
                if (metric, split, setting.weights, steps) not in have:
                    yield metric, split, f"{steps} steps"


def _numbers_at_the_end(run: Run, config: ExperimentConfig) -> Iterator[tuple[str, str, str, int]]:
    """(metric, split, weights, steps) of every number that was taken as asked at the end of the budget."""
    lines = run.evals()
    end = max((line["images"] for line in lines), default=0)
    if end < budget_images(config):
        return
    for line in lines:
        if line["images"] == end and as_asked(line["protocol_fields"], config):
            yield line["metric"], line["split"], line["weights"], line["steps"]


def budget_images(config: ExperimentConfig) -> int:
    """Images of the budget; 0 when it is counted in evaluations."""
    budget = config.train.budget
    by_unit = {"images": budget.amount, "iterations": budget.amount * config.train.batch_size}
    return by_unit.get(budget.unit, 0)


def as_asked(fields: Mapping[str, Any], config: ExperimentConfig) -> bool:
    """Whether a number was taken with the sampler and on as many images as ``config`` asks for.

    A run that two budgets share holds the numbers of both.
    """
    asked = config.eval
    if config.method.trains and not _drawn_by(fields, asked.sampler_at(fields["steps"])):
        return False
    if fields["images_per_prompt"] > 1:  # a split may have fewer different prompts than asked for
        per_prompt = fields["images_per_prompt"] == asked.images_per_prompt
        return per_prompt and fields["num_images"] <= asked.num_diversity_prompts * asked.images_per_prompt
    return fields["num_images"] == asked.num_images and fields["num_reference"] in (0, asked.num_reference)


def _drawn_by(fields: Mapping[str, Any], sampler: Sampler) -> bool:
    """Whether a protocol's samples were drawn with this solver, eta and cache."""
    wanted = sampler.protocol_fields()
    return (fields["solver"], fields.get("cache", "none")) == (wanted["solver"], wanted["cache"])
