"""Run folders and committed records as one tidy frame: one line for every number that a grid asks for.

A planned number that does not exist yet is a line with ``value`` nan, so that holes are data and not absence.
Committed records (``analysis/records/runs/<run id>/``, one for all grids that have the run) are small run folders
and go through the same code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ablations.grid import Cell, Grid
from ablations.status import FINAL, as_asked
from analysis import manifest
from core.measured import Number, newest, protocol_fields
from core.metrics.cost import TrainingCost, training_cost
from core.metrics.protocol import SAMPLING_FIELDS, comparable_id
from core.run import Run, find_runs
from core.schema import UserError

RECORDS = Path(__file__).parent / "records" / "runs"
COLUMNS = [
    "grid", "scale", "budget", "row", "label", "reference", "seed", "run", "state", "dirty",
    "metric", "split", "steps", "nfe", "guidance", "weights", "images", "value", "n",
    "protocol", "comparable", "fields", "time",
]  # fmt: skip


@dataclass(frozen=True)
class Copy:
    """One folder of a run; a committed record and a live run folder of the same id are two copies."""

    run: Run
    state: str
    provenance: dict[str, Any]

    @property
    def dirty(self) -> bool:
        return bool(self.provenance.get("dirty_patch"))


@dataclass(frozen=True)
class CellRun:
    """A cell of a grid with the copies of its run; none as long as nobody has started it."""

    cell: Cell
    copies: tuple[Copy, ...]

    @property
    def first(self) -> Copy | None:
        """The copy that pictures, costs and provenance are read from: a finished one if there is any."""
        finished = [copy for copy in self.copies if copy.state in FINAL]
        return next(iter([*finished, *self.copies]), None)

    @property
    def state(self) -> str:
        if self.cell.unresolved:
            return self.cell.unresolved
        return self.first.state if self.first else "planned"

    @property
    def cost(self) -> TrainingCost:
        return training_cost(self.first.run.metrics() if self.first else [])


def cell_runs(grid: Grid, scale: str, budget: str, sources: Sequence[Path]) -> list[CellRun]:
    """Every cell of the grid with the copies of its run below ``sources`` (folders of runs), in their order.

    All copies count: the teacher's run may be measured anew for a demo while its full numbers are a record.
    """
    known: dict[str, list[Path]] = {}
    for source in sources:
        for path in find_runs(source):
            known.setdefault(path.name.rpartition("-")[2], []).append(path)
    return [
        CellRun(cell, tuple(_copy(path, cell) for path in known.get(cell.id, [])))
        for cell in grid.expand(scale, budget, strict=False)
    ]


@dataclass(frozen=True)
class Results:
    """A grid at one scale and budget: its cells with their runs, and the tidy frame of what was measured."""

    grid: Grid
    scale: str
    budget: str
    items: tuple[CellRun, ...]
    frame: pd.DataFrame

    @cached_property
    def shared(self) -> pd.DataFrame:
        """The lines of ``frame`` that may stand in one table (``comparable``), chosen once; not to be written into."""
        return comparable(self.frame)

    @cached_property
    def values(self) -> Mapping[tuple[str, str, str], Sequence[tuple[int, float, float]]]:
        """(seed, number of evaluations, raw value) of every number of ``shared``, by row, metric and split."""
        found: dict[tuple[str, str, str], list[tuple[int, float, float]]] = {}
        columns = ("row", "metric", "split", "seed", "nfe", "value", "state")
        for row, metric, split, seed, nfe, value, state in plain_rows(self.shared, columns):
            if value == value and state != "diverged":
                found.setdefault((row, metric, split), []).append((seed, nfe, value))
        return found


def results(grid: Grid, scale: str, budget: str, sources: Sequence[Path]) -> Results:
    """Numbers below ``sources`` of a grid."""
    grid = grid.scaled(scale)
    items = cell_runs(grid, scale, budget, sources)
    return Results(grid, scale, budget, tuple(items), collect(grid, items, scale, budget))


def _copy(path: Path, cell: Cell) -> Copy:
    manifest.check(path)
    run = Run(path, cell.id, cell.config)
    return Copy(run, run.state(), run.provenance())


def collect(grid: Grid, items: Sequence[CellRun], scale: str, budget: str) -> pd.DataFrame:
    """The tidy frame of ``grid`` from the runs of its cells at one scale and budget.

    Columns: COLUMNS; ``comparable`` is the protocol's id without its sampling fields.
    Only numbers at the end of a run's budget count; a run that is still training has none.
    """
    references = {reference.id for reference in grid.references}
    lines: list[tuple[Any, ...]] = []
    for item in items:
        cell = item.cell
        is_reference = cell.row in references
        base = (grid.name, scale, budget, cell.row, cell.label, is_reference, cell.seed, cell.id)
        measured: list[Number] = []
        for copy in item.copies:
            found = as_asked(_final_numbers(copy), cell.config)
            lines += [(*base, copy.state, copy.dirty, *_shown(number)) for number in found]
            measured += found
        lines += [(*base, item.state, False, *hole) for hole in _holes(grid, measured, is_reference)]
    return pd.DataFrame(lines, columns=COLUMNS)


def _holes(grid: Grid, measured: Sequence[Number], reference: bool) -> Iterator[tuple[Any, ...]]:
    """The end of a line for each number of one cell that the grid asks for and nobody has measured."""
    asked: list[int | None] = [None]  # a reference is measured at its own number of evaluations
    if not reference:
        asked = list(dict.fromkeys([*grid.layout.nfe, *grid.evaluate.steps]))
    have = {(number.metric, number.split, None if reference else number.nfe) for number in measured}
    for metric, split, nfe in itertools.product(grid.metrics, grid.layout.splits, asked):
        if (metric, split, nfe) not in have:
            yield metric, split, nfe, nfe, *(math.nan,) * 9


def _final_numbers(copy: Copy) -> list[Number]:
    """The measurements of a finished run at its end, of the weights that its configuration names."""
    if copy.state not in FINAL:
        return []
    numbers, config = copy.run.numbers(), copy.run.config
    if not config.method.trains:
        return newest(numbers)
    return newest(number for number in numbers if number.weights == config.eval.weights)


def _shown(number: Number) -> tuple[Any, ...]:
    """The end of a line, from ``metric`` on."""
    fields = protocol_fields(bytes(number.protocol_fields))
    return (
        number.metric, number.split, number.steps, number.nfe, number.guidance, number.weights, number.images,
        number.value, number.n, number.protocol, comparable_id(fields), fields, number.time,
    )  # fmt: skip


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with one protocol for each (metric, split): the newest that all of its evaluated runs share.

    UserError when scales or budgets are mixed, or when the runs share no protocol.
    """
    for key in ("scale", "budget"):
        values = sorted(frame[key].unique())
        if len(values) > 1:
            raise UserError(f"numbers of {key} {' and '.join(values)} may not stand in one table; give one --{key}")
    protocols = _shared_protocols(frame)
    newest: dict[tuple[Any, ...], tuple[bool, str, int]] = {}
    columns = ("run", "row", "metric", "split", "steps", "value", "comparable", "time")
    for place, (*cell, steps, value, protocol, time) in enumerate(plain_rows(frame, columns)):
        is_hole = value != value
        if not is_hole and protocol != protocols[cell[2], cell[3]]:
            continue
        key, rank = (*cell, None if steps != steps else steps), (is_hole, "" if time != time else time, place)
        newest[key] = max(newest.get(key, rank), rank)
    return frame.iloc[sorted(place for _, _, place in newest.values())]


def plain_rows(frame: pd.DataFrame, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The lines of a frame as plain values, which is quicker than asking pandas for each group of a small table."""
    return zip(*(frame[name].tolist() for name in columns), strict=True)


def _shared_protocols(frame: pd.DataFrame) -> dict[tuple[str, str], str]:
    """The protocol of each (metric, split) that all evaluated runs share, the newest of several."""
    runs: dict[tuple[str, str], dict[str, set[str]]] = {}
    times: dict[tuple[str, str, str], str] = {}
    columns = ("metric", "split", "comparable", "run", "time", "value")
    for metric, split, protocol, run, time, value in plain_rows(frame, columns):
        if value == value:
            runs.setdefault((metric, split), {}).setdefault(protocol, set()).add(run)
            times[metric, split, protocol] = max(times.get((metric, split, protocol), time), time)
    chosen = {}
    for (metric, split), holders in runs.items():
        every = set().union(*holders.values())
        shared = sorted(protocol for protocol, own in holders.items() if own == every)
        if not shared:
            raise _mixed(frame, metric, split, sorted(holders)[:2])
        chosen[metric, split] = max(shared, key=lambda protocol: times[metric, split, protocol])  # noqa: B023
    return chosen


def _mixed(frame: pd.DataFrame, metric: str, split: str, protocols: Sequence[str]) -> UserError:
    """The mistake of numbers that were measured in two ways."""
    part = frame[(frame["metric"] == metric) & (frame["split"] == split)]
    one, other = (part[part["comparable"] == name].iloc[0] for name in protocols)
    differing = [
        f"{key} ({one['fields'].get(key)} and {other['fields'].get(key)})"
        for key in {**one["fields"], **other["fields"]}
        if key not in SAMPLING_FIELDS and one["fields"].get(key) != other["fields"].get(key)
    ]
    return UserError(
        f"{metric} on {split} captions mixes protocols: runs {one['run']} and {other['run']} differ in "
        f"{', '.join(differing)}; evaluate them alike (fewstep evaluate RUN)"
    )


def values_by_seed(of: Results, row: str, metric: str, split: str, nfe: int | None = None) -> dict[int, float]:
    """Raw values of one row by training seed, of numbers that may stand together; a diverged seed is left out.

    ``nfe`` None: at whatever number of evaluations it was measured, for a reference that is measured at one.
    """
    found = of.values.get((row, metric, split), ())
    return {seed: value for seed, at, value in found if nfe is None or at == nfe}
