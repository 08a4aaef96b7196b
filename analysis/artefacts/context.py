"""The results that artefacts are made from, and the files that they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from matplotlib.figure import Figure

from ablations.grid import load, names
from analysis.collect import Results, results
from analysis.columns import shown_column
from analysis.looks import encode
from analysis.stats import Summary, summarize
from analysis.tables import Table, build_table

File = tuple[str, str | bytes]  # name, content
SCALE, BUDGET = "emoji", "full"


@dataclass(frozen=True)
class Context:
    """Run folders and committed records; every grid is read, and its table made, once."""

    sources: tuple[Path, ...]

    @cached_property
    def grids(self) -> Mapping[str, Results]:
        """Every grid that has emoji scale, at its full budget."""
        loaded = (load(name) for name in names())
        return {grid.name: results(grid, SCALE, BUDGET, self.sources) for grid in loaded if SCALE in grid.base}

    @cached_property
    def tables(self) -> Mapping[str, Table]:
        """The table of each of ``grids``."""
        return {name: build_table(of) for name, of in self.grids.items()}


def measured(of: Results, split: str, nfe: int) -> dict[tuple[str, str], Summary]:
    """Shown values on ``split`` at ``nfe`` over the seeds that have not diverged, by (row, metric)."""
    frame = of.shared
    frame = frame[(frame["split"] == split) & (frame["nfe"] == nfe) & frame["value"].notna()]
    frame = frame[frame["state"] != "diverged"]
    return {
        (row, metric): summarize(shown_column(of.grid, metric).factor * part["value"])
        for (row, metric), part in frame.groupby(["row", "metric"])
    }


def figure_files(name: str, figure: Figure, caption: str) -> Iterator[File]:
    """Yield a figure as PNG and PDF, and its caption as text."""
    for format in ("png", "pdf"):
        yield f"{name}.{format}", encode(figure, format)
    yield f"{name}.txt", caption + "\n"
