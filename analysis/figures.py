"""Figures of a grid: quality against NFE for every row, or side by side at one NFE."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablations.grid import Grid
from ablations.schema import Row
from analysis.captions import notes
from analysis.collect import comparable
from analysis.columns import Column, shown_column
from analysis.dots import Dot, draw_dots, limits, spread
from analysis.drawn import Drawn, drawn, figure_metrics
from analysis.labels import capitalized, mathtext
from analysis.looks import GREY, INK, LABEL_SIZE, LEGEND_SIZE, label_outer, legend_above, look, style, wrapped
from analysis.stats import Summary
from analysis.tables import decimals
from core.splits import captions

WIDTH = 3.4  # inches: one column of a paper
DOT_LABELS = 1.3  # inches beside panels of dots
LINE_DASHES = ((0, (6, 2)), (0, (1, 1.6)), (0, (6, 1.6, 1, 1.6)), "-")  # of references that are lines
CURVE_MARKERS, CURVE_DASHES = "x+1|", ("-", "--", ":")  # of references that are curves


def grid_figure(grid: Grid, frame: pd.DataFrame) -> Figure:
    """One panel for each measured metric with a direction (rows) and split (columns), one column of a paper wide.

    Quality against NFE, where a row was measured at several; otherwise a line of dots for each row and reference.
    Points are means over seeds, bars the sample standard deviation.
    """
    shown = drawn(grid, comparable(frame))
    with style():
        if shown.frame.empty:
            figure = Figure(figsize=(WIDTH, 0.6), layout="none")
            figure.text(0.5, 0.5, "No run has been evaluated yet.", ha="center", va="center")
            return figure
        return _curves(shown) if shown.has_curves else _dots(shown)


def caption(grid: Grid, frame: pd.DataFrame) -> str:
    """The caption that belongs under ``grid_figure``: what is drawn, scale, seeds, N and protocols."""
    frame = comparable(frame)
    columns = tuple(shown_column(grid, metric) for metric in figure_metrics(grid))
    shown = drawn(grid, frame)
    origin = f" (after {grid.source})" if grid.source else ""
    teacher = "grey and black lines are" if shown.has_curves else "grey crosses are"
    sentences = [
        f"{grid.title}{origin}. Points are means over training seeds, bars their standard deviation; {teacher} the "
        "teacher."
    ]
    missing = list(shown.left_out())
    if missing and len(shown.frame):
        sentences.append(f"Not measured, so not drawn: {', '.join(missing)}.")
    return " ".join([*sentences, *notes(frame, columns)])


def _panels(axes: np.ndarray, shown: Drawn) -> Iterator[tuple[Axes, Column, pd.DataFrame]]:
    """Every panel with its column and its part of the frame; those of which nothing was measured are left out."""
    for panels, column in zip(axes, shown.columns, strict=True):
        for ax, split in zip(panels, shown.splits, strict=True):
            part = shown.panel(column, split)
            if part.empty:
                _leave_out(ax)
            else:
                yield ax, column, part


# --- several numbers of evaluations -----------------------------------------------------------------------------


def _curves(shown: Drawn) -> Figure:
    figure = Figure(figsize=(WIDTH, 0.35 + 1.15 * len(shown.columns)))
    axes = figure.subplots(len(shown.columns), len(shown.splits), sharex=True, sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for ax, column, part in _panels(axes, shown):
        handles |= _students(ax, shown, part, column)
        handles |= _reference_curves(ax, shown, part, column)
        handles |= _reference_lines(ax, shown, part, column)
    for panels, column in zip(axes, shown.columns, strict=True):
        panels[0].set_ylabel(wrapped(figure, column.axis, 1.1, LABEL_SIZE))
    _titles(axes, shown)
    ticks = shown.ticks
    axes[0][0].set_xscale("log", base=2)
    axes[0][0].set_xticks(ticks, [str(nfe) for nfe in ticks])
    axes[0][0].set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)
    label_outer(axes)
    figure.align_ylabels()
    figure.supxlabel("Network evaluations per image (NFE)", fontsize=LABEL_SIZE)
    rows = [mathtext(row.label) for _, row in shown.rows]
    legend_above(figure, {label: handles[label] for label in [*rows, *handles] if label in handles}, 3)
    return figure


def _students(ax: Axes, shown: Drawn, part: pd.DataFrame, column: Column) -> dict[str, Any]:
    """Draw the curve of each row; by label."""
    handles = {}
    for index, row in shown.rows:
        points = shown.points(part, column, row)
        dodge = 2 ** (0.07 * (index - (len(shown.grid.rows) - 1) / 2))  # bars of neighbouring rows stay apart
        handles[mathtext(row.label)] = ax.errorbar(
            [nfe * dodge for nfe in points],
            [s.mean for s in points.values()],
            yerr=[spread(s) for s in points.values()],
            **look(index),
        )
    ax.grid(axis="x", visible=False)
    ax.locator_params(axis="y", nbins=4)  # a number that follows the size would change after the layout
    return handles


def _reference_lines(ax: Axes, shown: Drawn, part: pd.DataFrame, column: Column) -> dict[str, Any]:
    """Draw the references that belong to no curve as horizontal lines; by label."""
    handles = {}
    lines = [(row, nfe) for row in shown.grid.references if not row.curve for nfe in shown.measured_at(row)]
    looks = itertools.cycle(itertools.product((INK, GREY), LINE_DASHES))
    for (row, nfe), (colour, dash) in zip(lines, looks, strict=False):
        found = shown.points(part, column, row).get(nfe)
        if found is not None:
            line = ax.axhline(found.mean, color=colour, linestyle=dash, linewidth=0.9, zorder=1)
            handles[f"{mathtext(row.label)} ({nfe} NFE)"] = line
    return handles


def _reference_curves(ax: Axes, shown: Drawn, part: pd.DataFrame, column: Column) -> dict[str, Any]:
    """Draw the references that name a curve as grey curves; by the curve's name."""
    handles = {}
    looks = itertools.cycle(itertools.product(CURVE_DASHES, CURVE_MARKERS))
    for (name, rows), (dash, marker) in zip(shown.reference_curves.items(), looks, strict=False):
        points: dict[int, Summary] = {}
        for row in rows:
            points |= shown.points(part, column, row)
        if points:
            marks = {"color": GREY, "marker": marker, "linestyle": dash, "linewidth": 0.8, "zorder": 1}
            nfe, found = zip(*sorted(points.items()), strict=True)
            (handles[mathtext(name)],) = ax.plot(nfe, [s.mean for s in found], **marks)
    return handles


def _titles(axes: np.ndarray, shown: Drawn) -> None:
    for ax, split in zip(axes[0], shown.splits, strict=True):
        ax.set_title(capitalized(captions(split)))


def _leave_out(ax: Axes) -> None:
    """No frame around nothing, but a word that says why."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=7)


# --- one number of evaluations for each row ---------------------------------------------------------------------


@dataclass(frozen=True)
class _DotLine:
    row: Row
    nfe: int
    label: str
    marks: dict[str, Any]


def _dots(shown: Drawn) -> Figure:
    lines = list(_dot_lines(shown))
    figure = Figure(figsize=(WIDTH, 1.0))
    labels = [wrapped(figure, line.label, DOT_LABELS, LEGEND_SIZE) for line in lines]
    height = 0.05 + 0.12 * max(label.count("\n") + 1 for label in labels)  # of a line
    figure.set_size_inches(WIDTH, 0.4 + (0.45 + height * len(lines)) * len(shown.columns))
    axes = figure.subplots(len(shown.columns), len(shown.splits), sharey=True, squeeze=False)
    room = (WIDTH - DOT_LABELS) / len(shown.splits) - 0.1
    for ax, column, part in _panels(axes, shown):
        _dot_panel(ax, [shown.points(part, column, line.row).get(line.nfe) for line in lines], lines)
        ax.set_xlabel(wrapped(figure, column.axis, room, LABEL_SIZE))
    axes[0][0].set_yticks(range(len(lines)), labels)
    _titles(axes, shown)
    label_outer(axes)
    at = f" at {shown.nfe[0]} network evaluations (NFE)" if len(shown.nfe) == 1 else ""
    figure.supxlabel(f"Means over seeds{at}", fontsize=LABEL_SIZE)
    return figure


def _dot_lines(shown: Drawn) -> Iterator[_DotLine]:
    """The rows, then what was not distilled, which has its number of evaluations in its label."""
    for index, row in shown.rows:
        marks = look(index) | {"linestyle": ""}
        for nfe in shown.measured_at(row):
            suffix = f" ({nfe} NFE)" if len(shown.nfe) > 1 else ""
            yield _DotLine(row, nfe, f"{mathtext(row.label)}{suffix}", marks)
    references = [
        _DotLine(row, nfe, f"{mathtext(row.label)} ({nfe} NFE)", {"color": GREY, "marker": "x", "linestyle": ""})
        for row in shown.grid.references
        for nfe in shown.measured_at(row)
    ]
    yield from sorted(references, key=lambda line: line.nfe)


def _dot_panel(ax: Axes, found: Sequence[Summary | None], lines: Sequence[_DotLine]) -> None:
    known = [summary for summary in found if summary is not None]
    smallest = min(abs(summary.mean) for summary in known)
    dots = [Dot(summary, line.marks) for summary, line in zip(found, lines, strict=True)]
    draw_dots(ax, dots, limits(known), decimals(smallest or 1.0, 3))
