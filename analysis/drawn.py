"""The choice of panels, rows and numbers that the figure of a grid shows, and of what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from ablations.grid import Grid
from ablations.schema import Row
from analysis.columns import Column, shown_column
from analysis.labels import without_math
from analysis.stats import Summary, summarize
from core.catalogue import METRICS
from core.splits import captions


@dataclass(frozen=True)
class Drawn:
    """The numbers of a grid that its figure shows: asked for, known, and of no diverged run."""

    grid: Grid
    budget: str
    frame: pd.DataFrame

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The measured ones of the metrics that have a panel."""
        known = set(self.frame["metric"])
        return tuple(shown_column(self.grid, name) for name in figure_metrics(self.grid) if name in known)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        known = set(self.frame["split"])
        return tuple(split for split in self.grid.layout.splits if split in known)

    @cached_property
    def rows(self) -> list[tuple[int, Row]]:
        """The measured rows of the budget by their place in the grid: a row has one look in all budgets."""
        known, asked = set(self.frame["row"]), self.grid.rows_of(self.budget)
        return [(index, row) for index, row in enumerate(self.grid.rows) if row in asked and row.id in known]

    @cached_property
    def nfe(self) -> list[int]:
        """The students' numbers of evaluations, in rising order."""
        return sorted({int(n) for n in self.frame.loc[~self.frame["reference"], "nfe"]})

    @cached_property
    def has_curves(self) -> bool:
        """Whether a row was measured at several numbers of evaluations."""
        students = self.frame[~self.frame["reference"]]
        return len(students) > 0 and int(students.groupby("row")["nfe"].nunique().max()) > 1

    @cached_property
    def reference_curves(self) -> dict[str, list[Row]]:
        """The references that name a curve, by its name."""
        found: dict[str, list[Row]] = {}
        for row in self.grid.references:
            if row.curve:
                found.setdefault(row.curve, []).append(row)
        return found

    @cached_property
    def ticks(self) -> list[int]:
        """The numbers of evaluations of students and of curves of references, in rising order."""
        found = set(self.nfe)
        for rows in self.reference_curves.values():
            for row in rows:
                found.update(self.measured_at(row))
        return sorted(found)

    def measured_at(self, row: Row) -> list[int]:
        """The numbers of evaluations of one row, in rising order."""
        return sorted({int(nfe) for nfe in self.frame.loc[self.frame["row"] == row.id, "nfe"]})

    def panel(self, column: Column, split: str) -> pd.DataFrame:
        return self.frame[(self.frame["metric"] == column.metric) & (self.frame["split"] == split)]

    def points(self, part: pd.DataFrame, column: Column, row: Row) -> dict[int, Summary]:
        """Shown values of a row over its seeds, by rising number of evaluations."""
        found = part[part["row"] == row.id].groupby("nfe")["value"]
        return {int(nfe): summarize(column.factor * values) for nfe, values in found}

    def left_out(self) -> Iterator[str]:
        """Every panel and row that would be empty."""
        for name in figure_metrics(self.grid):
            yield from self._empty_panels(shown_column(self.grid, name))
        known = set(self.frame["row"])
        for row in (*self.grid.rows_of(self.budget), *self.grid.references):
            if row.id not in known:
                yield without_math(row.label)

    def _empty_panels(self, column: Column) -> Iterator[str]:
        splits = self.grid.layout.splits
        empty = [split for split in splits if self.panel(column, split).empty]
        if len(empty) == len(splits):
            yield column.label
            return
        for split in empty:
            yield f"{column.label} on {captions(split)}"


def drawn(grid: Grid, frame: pd.DataFrame) -> Drawn:
    """The part of a ``comparable`` frame that the figure of ``grid`` shows."""
    # Other grids that have the same run may ask for more steps of it: of one row, or of one seed
    asked = frame["reference"] | frame["nfe"].isin([*grid.layout.nfe, *grid.evaluate.steps])
    asked &= frame["metric"].isin(figure_metrics(grid)) & frame["split"].isin(grid.layout.splits)
    known = frame["value"].notna() & (frame["state"] != "diverged")
    budget = str(frame["budget"].iat[0]) if len(frame) else next(iter(grid.budgets))
    return Drawn(grid, budget, frame[asked.astype(bool) & known])


def figure_metrics(grid: Grid) -> list[str]:
    """The metrics that have a panel: those whose best is marked, without a biased distance where the unbiased one of
    the same features is there."""
    judged = [name for name in grid.metrics if name in grid.layout.best] or list(grid.metrics[:2])
    return [name for name in judged if METRICS[name].drawn_instead not in judged]
