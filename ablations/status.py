"""The status of a grid's cells (done, running, to do, and why), from run folders alone. Torch-free."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ablations.grid import Cell
from core.config import ExperimentConfig
from core.measured import Number, newest, protocol_fields
from core.run import Run, find_runs

DIVERGED = "diverged"
FINAL = ("done", DIVERGED)  # a diverged run is a result, but nothing starts from it
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
    run = Run(path, cell.id)
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
    numbers = newest(run.numbers())
    if numbers and numbers[0].images < budget_images(config):
        numbers = []
    have = {(n.metric, n.split, n.weights, n.steps) for n in as_asked(numbers, config)}
    for split in config.eval.splits:
        for setting in config.settings():
            steps = setting.sampler.steps
            for metric in config.eval.metrics:
                if (metric, split, setting.weights, steps) not in have:
                    yield metric, split, f"{steps} steps"


def budget_images(config: ExperimentConfig) -> int:
    """Images of the budget; 0 when it is counted in evaluations."""
    budget = config.train.budget
    by_unit = {"images": budget.amount, "iterations": budget.amount * config.train.batch_size}
    return by_unit.get(budget.unit, 0)


class _Asked(NamedTuple):
    """The settings of a configuration that decide which numbers it asks for."""

    trains: bool
    solver: str  # of the student
    cache: str
    guidance: float
    images_per_prompt: int
    num_images: int
    num_diversity_prompts: int
    num_reference: int


def as_asked(numbers: Iterable[Number], config: ExperimentConfig) -> list[Number]:
    """The numbers that were taken with the sampler and on as many images as ``config`` asks for.

    A run that two budgets share holds the numbers of both.
    """
    asked, sampler = config.eval, config.eval.sampler_at(1)
    wanted = _Asked(
        config.method.trains, sampler.name, sampler.cache, sampler.guidance, asked.images_per_prompt, asked.num_images,
        asked.num_diversity_prompts, asked.num_reference,
    )  # fmt: skip
    return [number for number in numbers if _is_asked(bytes(number.protocol_fields), wanted)]


@functools.lru_cache(maxsize=4096)
def _is_asked(written: bytes, asked: _Asked) -> bool:
    """Whether a protocol is one that is asked for; thousands of numbers share a few."""
    fields = protocol_fields(written)
    how = fields["solver"], fields.get("cache", "none"), fields.get("guidance", 1.0)
    if asked.trains and how != (asked.solver, asked.cache, asked.guidance):
        return False
    if fields["images_per_prompt"] > 1:  # a split may have fewer different prompts than asked for
        per_prompt = fields["images_per_prompt"] == asked.images_per_prompt
        return per_prompt and fields["num_images"] <= asked.num_diversity_prompts * asked.images_per_prompt
    return fields["num_images"] == asked.num_images and fields["num_reference"] in (0, asked.num_reference)
