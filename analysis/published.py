"""What the sources say, beside what we measured: published numbers (published.csv) and published directions.

A published number is never ours: it keeps its own column, with its scale in the heading. A direction is an
inequality between two rows of the grid, judged by the seed-paired difference of our runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from ablations.grid import Grid
from analysis.columns import Column
from analysis.stats import Summary, paired_difference
from core.schema import UserError

FILE = Path(__file__).parent / "published.csv"


@dataclass(frozen=True)
class Published:
    """Published numbers of one artefact: ``numbers[(row, nfe)]`` has one text for each heading."""

    headings: tuple[str, ...]
    numbers: Mapping[tuple[str, int | None], tuple[str, ...]]

    def of(self, label: str, nfe: int | None) -> tuple[str, ...]:
        """The texts beside one line; empty ones where the source gives no number."""
        return self.numbers.get((label, nfe), ("",) * len(self.headings))


@dataclass(frozen=True)
class Comparison:
    """A published direction beside our seed-paired difference ``row - versus`` in shown units."""

    claim: str
    contrast: str
    split: str
    nfe: int
    column: Column
    expected: str  # lower | higher
    difference: Summary

    @property
    def verdict(self) -> str:
        """The sign says agree or not; it is decided when the 95% t interval excludes zero."""
        if self.difference.n == 0:
            return "no data"
        same = self.difference.mean < 0 if self.expected == "lower" else self.difference.mean > 0
        decided = self.difference.excludes_zero()
        return f"{'agrees' if same else 'disagrees'}{'' if decided else ' (undecided)'}"


@cache
def _table() -> pd.DataFrame:
    return pd.read_csv(FILE, dtype={"nfe": "Int64"})


def published_numbers(grid: Grid) -> Published:
    """Numbers of the grid's published artefact; none for a figure whose numbers are not in the text."""
    table = _table()
    paper = re.sub(r"\W+", "_", grid.source.partition(",")[0].lower())  # "Flash Diffusion, Table 1": flash_diffusion
    table = table[(table["source"] == paper) & (table["artefact"] == grid.published.artefact)]
    metrics = list(dict.fromkeys(zip(table["metric"], table["scale"], strict=True)))
    numbers = {}
    for (row, nfe), part in table.groupby(["row", "nfe"], dropna=False):
        found = {(m, s): f"{v:g}" for m, s, v in zip(part["metric"], part["scale"], part["value"], strict=True)}
        numbers[row, None if pd.isna(nfe) else int(nfe)] = tuple(found.get(key, "") for key in metrics)
    return Published(tuple(f"published {metric} ({scale})" for metric, scale in metrics), numbers)


def comparisons(grid: Grid, frame: pd.DataFrame, columns: tuple[Column, ...]) -> tuple[Comparison, ...]:
    """Every published direction at the grid's first NFE, on each split."""
    labels = {row.id: row.label for row in grid.rows}
    shown = {column.metric: column for column in columns}
    nfe, out = grid.layout.nfe[0], []
    for direction in grid.published.directions:
        if direction.metric not in shown:
            raise UserError(f"{grid.name}: published direction on {direction.metric}, which is not in its metrics")
        column = shown[direction.metric]
        for split in grid.layout.splits:
            part = frame[(frame["metric"] == direction.metric) & (frame["split"] == split) & (frame["nfe"] == nfe)]
            difference = paired_difference(
                _by_seed(part, direction.row, column), _by_seed(part, direction.versus, column)
            )
            contrast = f"{labels[direction.row]} − {labels[direction.versus]}"
            out.append(Comparison(direction.claim, contrast, split, nfe, column, direction.expected, difference))
    return tuple(out)


def _by_seed(frame: pd.DataFrame, row: str, column: Column) -> dict[int, float]:
    counted = frame[(frame["row"] == row) & frame["value"].notna() & (frame["state"] != "diverged")]
    return dict(zip(counted["seed"], column.factor * counted["value"], strict=True))
