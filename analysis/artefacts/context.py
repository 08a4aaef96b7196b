"""The results that artefacts are made from, and the files that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ablations.grid import load, names
from analysis import spread
from analysis.claims import load_claims
from analysis.collect import Results, results
from analysis.columns import shown_column
from analysis.drawing import FORMATS, Drawing, draw_all
from analysis.spread import BUDGET, SCALE
from analysis.stats import Summary, summarize
from analysis.tables import Table, build_table
from analysis.verdicts import Judgement, with_rates
from core.catalogue import READINGS

File = tuple[str, str | bytes]  # name, content
Piece = File | Drawing


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

    @cached_property
    def judgements(self) -> Sequence[Judgement]:
        """The claims about all grids, judged together."""
        return with_rates([judgement for table in self.tables.values() for judgement in table.judgements])

    @cached_property
    def spread(self) -> str:
        """``spread.csv`` as these results give it."""
        readings = {name: [] for name in self.grids}
        for claim in load_claims():
            readings[claim.grid] += [c.metric for c in claim.contrasts if c.metric in READINGS]
        return spread.to_csv(spread.measure(self.grids.values(), readings))


def measured(of: Results, split: str, nfe: int) -> dict[tuple[str, str], Summary]:
    """Shown values on ``split`` at ``nfe`` over the seeds that have not diverged, by (row, metric)."""
    frame = of.shared
    frame = frame[(frame["split"] == split) & (frame["nfe"] == nfe) & frame["value"].notna()]
    frame = frame[frame["state"] != "diverged"]
    return {
        (row, metric): summarize(shown_column(of.grid, metric).factor * part["value"])
        for (row, metric), part in frame.groupby(["row", "metric"])
    }


def figure(
    name: str, draw: Callable[..., Figure], *arguments: Any, caption: str, reads: Sequence[Path] = ()
) -> Iterator[Piece]:
    """Yield a figure that is still to be drawn, as PNG and PDF, and its caption as text."""
    yield Drawing(name, draw, arguments, tuple(reads))
    yield f"{name}.txt", caption + "\n"


def finished(pieces: Iterable[Piece]) -> Iterator[File]:
    """The files of ``pieces``, in their order, with all figures drawn."""
    pieces = list(pieces)
    contents = draw_all([piece for piece in pieces if isinstance(piece, Drawing)])
    for piece in pieces:
        if isinstance(piece, Drawing):
            yield from zip((f"{piece.name}.{format}" for format in FORMATS), next(contents), strict=True)
        else:
            yield piece


def logs(of: Results) -> list[Path]:
    """The files of the logs and numbers of all runs of a grid."""
    runs = [item.first.run.path for item in of.items if item.first is not None]
    return [path / name for path in runs for name in ("metrics.jsonl", "evals.jsonl")]
