"""Tables made from a tidy frame: blocks of equal NFE, mean and spread over seeds, best marked, holes explicit.

A number never enters unmarked: a dirty commit, a diverged or a missing seed is a mark with a footnote, and a
cell without any value names the run that would fill it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pandas as pd

from ablations.grid import Grid
from ablations.schema import Row
from analysis.captions import notes
from analysis.collect import Results, plain_rows
from analysis.columns import Column, shown_column
from analysis.inference import LEVEL
from analysis.labels import capitalized
from analysis.published import Published, published_numbers
from analysis.spread import Spread, borrowed
from analysis.stats import Summary, summarize
from analysis.training import by_seed
from analysis.verdicts import Judgement, judge
from core.splits import captions

MARKS = {
    "dirty": ("*", "trained from a working tree with uncommitted changes"),
    "diverged": ("‡", "a seed diverged; it is left out of the mean"),
    "seeds": ("†", "fewer seeds than planned"),
}
REFERENCE, PUBLISHED = "Reference", "Published elsewhere"
REMARKS = {"heldout": " (unseen combinations of seen words)"}  # what sets a split apart, beside its name


@dataclass(frozen=True)
class Entry:
    """One number in shown units; ``missing`` names every run whose value is absent (all of them: a hole)."""

    summary: Summary
    missing: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    best: bool = False
    seeds: Mapping[int, float] = field(default_factory=dict)  # the values behind ``summary``

    @property
    def is_empty(self) -> bool:
        """Nothing is asked for: an undistilled teacher has no training that could cost anything."""
        return self.summary.n == 0 and not self.missing

    @property
    def symbols(self) -> str:
        return "".join(MARKS[mark][0] for mark in self.marks)


@dataclass(frozen=True)
class Line:
    """One row of a block; ``nfe`` is None for a reference that nobody has evaluated yet."""

    row: str
    label: str
    nfe: int | None
    entries: tuple[Entry, ...]
    published: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Lines that are compared with each other: the references, or the rows at one NFE."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Panel:
    """All blocks of one caption split."""

    split: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Table:
    """A finished table; the renderers of ``analysis.render`` only lay it out."""

    name: str
    title: str
    source: str
    scale: str
    budget: str
    columns: tuple[Column, ...]
    digits: tuple[int, ...]  # decimals of each column
    published_columns: tuple[str, ...]
    panels: tuple[Panel, ...]
    judgements: tuple[Judgement, ...]
    notes: tuple[str, ...]  # what the numbers are: budget, seeds, N, protocols

    @property
    def entries(self) -> list[Entry]:
        return [e for panel in self.panels for block in panel.blocks for line in block.lines for e in line.entries]

    @property
    def footnotes(self) -> tuple[str, ...]:
        used = {mark for entry in self.entries for mark in entry.marks}
        return tuple(f"{symbol} {meaning}" for mark, (symbol, meaning) in MARKS.items() if mark in used)

    @property
    def holes(self) -> tuple[str, ...]:
        """Every run without which a number is absent or rests on fewer seeds."""
        return tuple(dict.fromkeys(name for entry in self.entries for name in entry.missing))


def build_table(of: Results) -> Table:
    """The table of a grid; UserError when its numbers may not stand together."""
    grid, frame = of.grid, of.shared
    columns = tuple(shown_column(grid, metric) for metric in (*grid.metrics, *grid.layout.costs))
    published = published_numbers(grid, of.scale)
    numbers = _index(frame) | _costs(of)
    rows = grid.rows_of(of.budget)
    panels = tuple(_panel(grid, rows, numbers, split, columns, published) for split in grid.layout.splits)
    digits = tuple(_digits(panels, index) for index in range(len(columns)))
    return Table(
        name=grid.name,
        title=grid.title,
        source=grid.source,
        scale=of.scale,
        budget=of.budget,
        columns=columns,
        digits=digits,
        published_columns=published.headings,
        panels=tuple(_mark_best(panel, columns, of) for panel in panels),
        judgements=tuple(judge(of)),
        notes=(*notes(frame, columns), *_cost_notes(columns, grid)),
    )


class _Read(NamedTuple):
    """A number or a hole, as far as a table reads it."""

    run: str
    row: str
    seed: int
    state: str
    dirty: bool
    value: float


# One for each planned seed, by (split, row, nfe, metric).
Numbers = Mapping[tuple[str, str, int | None, str], Sequence[_Read]]


def _index(frame: pd.DataFrame) -> Numbers:
    out: dict[tuple[str, str, int | None, str], list[_Read]] = {}
    for split, row, nfe, metric, *line in plain_rows(frame, ("split", "row", "nfe", "metric", *_Read._fields)):
        is_known = nfe is not None and nfe == nfe
        key = split, row, int(nfe) if is_known else None, metric
        out.setdefault(key, []).append(_Read(*line))
    return out


def _costs(of: Results) -> Numbers:
    """Costs of the rows, which are those of every split and NFE: under the split "" and no NFE."""
    out = {}
    for row in of.grid.rows_of(of.budget):
        for metric in of.grid.layout.costs:
            seeds = by_seed(of.items, row.id, metric)
            cells = [item for item in of.items if item.cell.row == row.id]
            out["", row.id, None, metric] = [
                _Read(i.cell.id, row.id, i.cell.seed, i.state, False, seeds.get(i.cell.seed, math.nan)) for i in cells
            ]
    return out


def _cost_notes(columns: tuple[Column, ...], grid: Grid) -> list[str]:
    return [f"{column.label}: {column.meaning}." for column in columns if column.metric in grid.layout.costs]


def _panel(
    grid: Grid, rows: Sequence[Row], numbers: Numbers, split: str, columns: tuple[Column, ...], published: Published
) -> Panel:
    def line(row: Row, nfe: int | None) -> Line:
        entries = []
        for shown in columns:
            if shown.metric in grid.layout.costs:
                entries.append(_entry(numbers.get(("", row.id, None, shown.metric), ()), shown))
                continue
            found = numbers.get((split, row.id, nfe, shown.metric), ())
            holes = numbers.get((split, row.id, None, shown.metric), ()) if nfe is not None else ()
            entries.append(_entry([*found, *holes], shown))
        return Line(row.id, row.label, nfe, tuple(entries), published.of(row.label, nfe))

    blocks = []
    if grid.references:
        known = {
            row.id: sorted(n for s, r, n, _ in numbers if (s, r) == (split, row.id) and n) for row in grid.references
        }
        lines = [line(row, nfe) for row in grid.references for nfe in dict.fromkeys(known[row.id] or [None])]
        blocks.append(Block(REFERENCE, _rising(lines)))
    for nfe in sorted(grid.layout.nfe):
        blocks.append(Block(f"{nfe} NFE", tuple(line(row, nfe) for row in rows)))
    known = {(line.label, line.nfe) for block in blocks for line in block.lines}
    others = [Line("", row, nfe, (Entry(summarize([])),) * len(columns), published.of(row, nfe))
              for row, nfe in published.beyond(known)]  # fmt: skip
    if others:
        blocks.append(Block(PUBLISHED, _rising(others)))
    return Panel(split, capitalized(captions(split)) + REMARKS.get(split, ""), tuple(blocks))


def _rising(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Lines by rising NFE, those of the same in their own order; what nobody has evaluated yet comes last."""
    return tuple(sorted(lines, key=lambda line: math.inf if line.nfe is None else line.nfe))


def _entry(lines: Sequence[_Read], shown: Column) -> Entry:
    """The entry of one row; ``lines`` holds one number or hole for each planned seed."""
    counted, lost, num_diverged = [], [], 0
    for line in lines:
        diverged = line.state == "diverged"
        num_diverged += diverged
        (lost if diverged or math.isnan(line.value) else counted).append(line)
    marks = []
    if any(line.dirty for line in counted):
        marks.append("dirty")
    if num_diverged:
        marks.append("diverged")
    if 0 < len(counted) < len(lines) - num_diverged:
        marks.append("seeds")
    seeds = {line.seed: shown.factor * line.value for line in counted}
    summary = summarize([shown.factor * line.value for line in counted])
    return Entry(summary, tuple(map(_missing_name, lost)), tuple(marks), seeds=seeds)


def _missing_name(line: _Read) -> str:
    """How a hole names its run; a finished run only lacks this evaluation."""
    state = "not evaluated" if line.state == "done" else line.state
    return f"{line.run} (row {line.row}, seed {line.seed}): {state}"


def _mark_best(panel: Panel, columns: tuple[Column, ...], of: Results) -> Panel:
    """Mark the best numbers of each column at each NFE."""
    blocks = []
    for block in panel.blocks:
        if block.title in (REFERENCE, PUBLISHED):
            blocks.append(block)
            continue
        marked = [_marked_column(block, index, shown, panel.split, of) for index, shown in enumerate(columns)]
        lines = [replace(line, entries=tuple(row)) for line, *row in zip(block.lines, *marked, strict=True)]
        blocks.append(replace(block, lines=tuple(lines)))
    return replace(panel, blocks=tuple(blocks))


def _marked_column(block: Block, index: int, shown: Column, split: str, of: Results) -> list[Entry]:
    """The entries of one column of a block, with those marked that cannot be told from the best at the 5% level.

    An entry of fewer seeds than others is never best, and none is where rows have a single seed, or where nothing is
    worse than the best.
    """
    entries = [line.entries[index] for line in block.lines]
    if not shown.better:
        return entries
    spread = borrowed(of, shown.metric, split, block.lines[0].nfe or 0)
    best = _best(entries, 1 if shown.better == "min" else -1, spread)
    return [replace(entry, best=entry in best) for entry in entries]


def _best(entries: Sequence[Entry], sign: int, spread: Spread) -> list[Entry]:
    """The entry of the least ``sign`` times its mean, and all that are not told apart from it; none if all are."""
    rivals = _of_most_seeds(entries)
    first = min(rivals, key=lambda rival: sign * rival.summary.mean, default=None)
    as_good = []
    for rival in rivals:
        if not _differs(rival, first, spread):
            as_good.append(rival)
    return as_good if len(as_good) < len(rivals) else []


def _of_most_seeds(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of as many seeds as any; none where that is a single one."""
    most = max(entry.summary.n for entry in entries)
    return [entry for entry in entries if entry.summary.n == most > 1]


def _differs(rival: Entry, best: Entry, spread: Spread) -> bool:
    """Whether two rows are told apart, by the test that claims are judged by."""
    difference = spread.estimate(rival.seeds, best.seeds)
    return rival is not best and difference.beyond(0.0) <= LEVEL


def _digits(panels: tuple[Panel, ...], index: int) -> int:
    """Decimals of a column, at most three.

    They are those of its median spread to one significant digit (two when it starts with 1 or 2), or three significant
    digits of the smallest value when no spread is known.
    """
    spreads, sizes = [], []
    for line in _lines(panels):
        summary = line.entries[index].summary
        if summary.sd > 0:
            spreads.append(summary.sd)
        if summary.n and summary.mean:
            sizes.append(abs(summary.mean))
    if spreads:
        median = sorted(spreads)[len(spreads) // 2]
        return decimals(median, 2 if f"{median:e}"[0] in "12" else 1)
    return decimals(min(sizes), 3) if sizes else 2


def _lines(panels: Sequence[Panel]) -> Iterator[Line]:
    for panel in panels:
        for block in panel.blocks:
            yield from block.lines


def decimals(value: float, significant: int) -> int:
    """Decimals that show ``significant`` digits of ``value``: between none and three."""
    exponent = int(f"{value:e}".split("e")[1])
    return min(max(significant - 1 - exponent, 0), 3)
