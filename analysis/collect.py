"""Run folders and committed records as one tidy frame: one line for every number that a grid asks for.

A planned number that does not exist yet is a line with ``value`` nan, so that holes are data and not absence.
Committed records (``analysis/records/runs/<run id>/``, one for all grids that have the run) are small run folders
and go through the same code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ablations.grid import Cell, Grid
from ablations.status import FINAL, as_asked
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


def results(grid: Grid, scale: str, budget: str, sources: Sequence[Path]) -> Results:
    """Numbers below ``sources`` of a grid."""
    grid = grid.scaled(scale)
    items = cell_runs(grid, scale, budget, sources)
    return Results(grid, scale, budget, tuple(items), collect(grid, items, scale, budget))


def _copy(path: Path, cell: Cell) -> Copy:
    run = Run(path, cell.id, cell.config)
    return Copy(run, run.state(), run.provenance())


def collect(grid: Grid, items: Sequence[CellRun], scale: str, budget: str) -> pd.DataFrame:
    """The tidy frame of ``grid`` from the runs of its cells at one scale and budget.

    Columns: COLUMNS; ``comparable`` is the protocol's id without its sampling fields.
    Only numbers at the end of a run's budget count; a run that is still training has none.
    """
    references = {reference.id for reference in grid.references}
    lines: list[dict[str, Any]] = []
    for item in items:
        cell = item.cell
        base = {
            "grid": grid.name, "scale": scale, "budget": budget, "row": cell.row, "label": cell.label,
            "reference": cell.row in references, "seed": cell.seed, "run": cell.id, "state": item.state,
        }  # fmt: skip
        measured = [
            base | {"state": copy.state, "dirty": copy.dirty} | _shown(number)
            for copy in item.copies
            for number in as_asked(_final_numbers(copy), cell.config)
        ]
        lines += measured + [base | {"dirty": False} | hole for hole in _holes(grid, measured, base["reference"])]
    return pd.DataFrame(lines, columns=COLUMNS)


def _holes(grid: Grid, measured: Sequence[dict[str, Any]], reference: bool) -> Iterator[dict[str, Any]]:
    """A line for each number of one cell that the grid asks for and nobody has measured."""
    asked: list[int | None] = [None]  # a reference is measured at its own number of evaluations
    if not reference:
        asked = list(dict.fromkeys([*grid.layout.nfe, *grid.evaluate.steps]))
    have = {(line["metric"], line["split"], None if reference else line["nfe"]) for line in measured}
    for metric, split, nfe in itertools.product(grid.metrics, grid.layout.splits, asked):
        if (metric, split, nfe) not in have:
            yield {"metric": metric, "split": split, "steps": nfe, "nfe": nfe, "value": math.nan}


def _final_numbers(copy: Copy) -> list[Number]:
    """The measurements of a finished run at its end, of the weights that its configuration names."""
    if copy.state not in FINAL:
        return []
    numbers, config = copy.run.numbers(), copy.run.config
    if not config.method.trains:
        return newest(numbers)
    return newest(number for number in numbers if number.weights == config.eval.weights)


_SHOWN = ("metric", "split", "steps", "nfe", "guidance", "weights", "images", "value", "n", "protocol", "time")


def _shown(number: Number) -> dict[str, Any]:
    fields = protocol_fields(bytes(number.protocol_fields))
    return {name: getattr(number, name) for name in _SHOWN} | {"fields": fields, "comparable": comparable_id(fields)}


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with one protocol for each (metric, split): the newest that all of its evaluated runs share.

    UserError when scales or budgets are mixed, or when the runs share no protocol.
    """
    for key in ("scale", "budget"):
        values = sorted(frame[key].unique())
        if len(values) > 1:
            raise UserError(f"numbers of {key} {' and '.join(values)} may not stand in one table; give one --{key}")
    kept = [frame[frame["value"].isna()]]
    for _, part in frame[frame["value"].notna()].groupby(["metric", "split"], sort=False):
        kept.append(part[part["comparable"] == _shared_protocol(part)])
    newest = pd.concat(kept).sort_values("time", kind="stable")
    return newest.drop_duplicates(["run", "row", "metric", "split", "steps"], keep="last").sort_index()


def values_by_seed(frame: pd.DataFrame, row: str, metric: str, split: str, nfe: int | None = None) -> dict[int, float]:
    """Raw values of one row by training seed, in a ``comparable`` frame; a diverged seed is left out.

    ``nfe`` None: at whatever number of evaluations it was measured, for a reference that is measured at one.
    """
    part = frame[(frame["row"] == row) & (frame["metric"] == metric) & (frame["split"] == split)]
    if nfe is not None:
        part = part[part["nfe"] == nfe]
    counted = part[part["value"].notna() & (part["state"] != "diverged")]
    return dict(zip(counted["seed"], counted["value"], strict=True))


def _shared_protocol(part: pd.DataFrame) -> str:
    runs = part["run"].nunique()
    holders = part.groupby("comparable").agg(runs=("run", "nunique"), time=("time", "max"))
    shared = holders[holders["runs"] == runs]
    if len(shared):
        return str(shared["time"].idxmax())
    one, other = (part[part["comparable"] == name].iloc[0] for name in holders.index[:2])
    differing = [
        f"{key} ({one['fields'].get(key)} and {other['fields'].get(key)})"
        for key in {**one["fields"], **other["fields"]}
        if key not in SAMPLING_FIELDS and one["fields"].get(key) != other["fields"].get(key)
    ]
    raise UserError(
        f"{part['metric'].iat[0]} on {part['split'].iat[0]} captions mixes protocols: runs {one['run']} and "
        f"{other['run']} differ in {', '.join(differing)}; evaluate them alike (fewstep evaluate RUN)"
    )
