"""Figures of a grid: quality against NFE for every row, and training curves. Equal input, equal bytes."""

from __future__ import annotations

import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ablations.grid import Grid
from analysis.captions import notes
from analysis.collect import CellRun, comparable
from analysis.columns import Column, shown_column
from analysis.labels import mathtext
from analysis.stats import summarize
from core.catalogue import METRICS

STYLE = Path(__file__).parent / "style.mplstyle"
# A figure that is part of a page takes the page's colours, so that it follows its light or dark theme.
INK, FAINT, PAPER = "#010203", "#dcdddf", "#fffffe"
WIDE = 5  # ratio of the largest value to the smallest from which a logarithmic axis helps
THREE_COLUMNS = 24  # characters of the longest label, of which three stand side by side
_PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--rule)", PAPER: "var(--card)"}
# Okabe and Ito's colours for all kinds of sight; marker and dash repeat the distinction for greyscale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK, "#999900")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (4, 1.5)),
    (0, (1.2, 1.2)),
    (0, (5, 1.2, 1.2, 1.2)),
    (0, (8, 2)),
    "-",
    "--",
    ":",
)
TITLES = {"train": "Train captions", "heldout": "Held-out captions"}
_NO_DATES = {"pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "png": {"Software": None},
             "svg": {"Date": None, "Creator": None}}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """The house style, whatever the user's own matplotlibrc says."""
    ours = matplotlib.rc_params_from_file(STYLE, use_default_template=True)
    with matplotlib.rc_context(ours):
        yield


def encode(figure: Figure, format: str) -> bytes:
    """``figure`` as png, pdf or svg, without dates or versions: the same figure gives the same bytes."""
    out = io.BytesIO()
    with style():
        engine = figure.get_layout_engine()
        if engine is not None:  # lay out once for all formats: it costs more than drawing
            engine.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(out, format=format, metadata=_NO_DATES[format])
    return out.getvalue()


def inline_svg(figure: Figure) -> str:
    """``figure`` as an ``<svg>`` element in the colours of the page that it is put into."""
    text = encode(figure, "svg").decode()
    for ours, page in _PAGE_COLOURS.items():
        text = text.replace(ours, page)
    return text[text.index("<svg") :]


def grid_figure(grid: Grid, frame: pd.DataFrame) -> Figure:
    """Metric against NFE: one panel for each metric with a direction (rows) and split (columns).

    Points are means over seeds, bars the sample standard deviation. References near the students' NFE are one
    grey curve, the others horizontal lines.
    """
    frame = comparable(frame)
    metrics = [shown_column(grid, metric) for metric in figure_metrics(grid)]
    splits = grid.layout.splits
    size = (3.4, 0.45 + 1.25 * len(metrics))
    with style():
        figure = Figure(figsize=size)
        axes = figure.subplots(len(metrics), len(splits), sharex=True, sharey="row", squeeze=False)
        for row, column in zip(axes, metrics, strict=True):
            for ax, split in zip(row, splits, strict=True):
                part = frame[(frame["metric"] == column.metric) & (frame["split"] == split)]
                _panel(ax, grid, part[part["value"].notna() & (part["state"] != "diverged")], column)
            row[0].set_ylabel(column.axis)
        for ax, split in zip(axes[0], splits, strict=True):
            ax.set_title(TITLES.get(split, split))
        figure.supxlabel("Network evaluations per image (NFE)", fontsize=8)
        handles, labels = axes[0][0].get_legend_handles_labels()
        columns = 3 if len(labels) > 6 and max(map(len, labels)) <= THREE_COLUMNS else 2
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    return figure


def caption(grid: Grid, frame: pd.DataFrame) -> str:
    """The caption that belongs under ``grid_figure``: what is drawn, scale, seeds, N and protocols."""
    frame = comparable(frame)
    columns = tuple(shown_column(grid, metric) for metric in figure_metrics(grid))
    origin = f" (after {grid.source})" if grid.source else ""
    drawn = (
        f"{grid.title}{origin}. Points are means over training seeds, bars their standard "
        "deviation; grey and black lines are the teacher."
    )
    return " ".join([drawn, *notes(frame, columns)])


def figure_metrics(grid: Grid) -> list[str]:
    """The metrics that have a panel: those whose best is marked, without a biased distance where the unbiased one of
    the same features is there."""
    judged = [name for name in grid.metrics if name in grid.layout.best] or list(grid.metrics[:2])
    return [name for name in judged if METRICS[name].drawn_instead not in judged]


def _panel(ax: Axes, grid: Grid, frame: pd.DataFrame, column: Column) -> None:
    # Other grids that have the same run may ask for more steps of it: of one row, or of one seed
    frame = frame[frame["reference"] | frame["nfe"].isin([*grid.layout.nfe, *grid.evaluate.steps])]
    ticks = sorted({int(n) for n in frame.loc[~frame["reference"], "nfe"]}) or list(grid.layout.nfe)
    ticks = sorted({*ticks, *_references(ax, grid, frame, column, 2 * max(ticks))})
    shown = [row.id for row in grid.rows_of(str(frame["budget"].iat[0]))] if len(frame) else []
    for index, row in enumerate(grid.rows):  # a row has one look, whatever the budget leaves out
        if row.id not in shown:
            continue
        part = frame[(frame["row"] == row.id) & frame["nfe"].isin(ticks)]
        points = [(nfe, summarize(column.factor * p["value"])) for nfe, p in part.groupby("nfe")]
        dodge = 2 ** (0.07 * (index - (len(grid.rows) - 1) / 2))  # bars of neighbouring rows stay apart
        ax.errorbar(
            [nfe * dodge for nfe, _ in points],
            [s.mean for _, s in points],
            yerr=[0.0 if s.n < 2 else s.sd for _, s in points],
            label=mathtext(row.label),
            **look(index),
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)
    ax.grid(axis="x", visible=False)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the ``index``-th row; open markers for every second one."""
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markerfacecolor": colour if index % 2 == 0 else PAPER,
        "elinewidth": 0.7,
    }


def _references(ax: Axes, grid: Grid, frame: pd.DataFrame, column: Column, widest: int) -> list[int]:
    """References of at most ``widest`` NFE are grey curves, one for each teacher and solver, the others lines; returns
    the curves' NFE."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    lines = 0
    for reference in grid.references:
        part = frame[frame["row"] == reference.id]
        for nfe, at in part.groupby("nfe"):
            mean = column.factor * float(at["value"].mean())
            if nfe <= widest:
                curves[re.sub(r", \d+ steps?\b.*", ", few steps", reference.label)][int(nfe)] = mean
                continue
            dash, label = (
                ((0, (6, 2)), (0, (1, 1.6)))[lines % 2],
                f"{mathtext(reference.label)} ({int(nfe)} NFE)",
            )
            ax.axhline(mean, color=INK, linestyle=dash, linewidth=0.9, zorder=1, label=label)
            lines += 1
    for (label, curve), marker in zip(curves.items(), itertools.cycle("x+1")):
        nfes = sorted(curve)
        values = [curve[n] for n in nfes]
        ax.plot(nfes, values, color="#7f7f7f", marker=marker, linewidth=0.8, zorder=1, label=mathtext(label))
    return sorted({nfe for curve in curves.values() for nfe in curve})


def training_curves(items: Sequence[CellRun]) -> Figure | None:
    """``log_curves`` of the first seed of each row; None without logs."""
    logs = {}
    for item in items:
        if item.first is not None and item.cell.config.method.trains and item.cell.row not in logs:
            logs[item.cell.row] = (item.cell.label, pd.DataFrame(item.first.run.metrics()))
    return log_curves([(label, log) for label, log in logs.values() if len(log)])


def log_curves(
    logs: Sequence[tuple[str, pd.DataFrame]], keys: Sequence[str] = (), *, log_axis: bool = False
) -> Figure | None:
    """Losses and gradient norms of every player against training images, one curve for each label; None without any.

    ``keys``: further numbers of the logs. ``log_axis``: for losses and norms that range over orders of magnitude.
    """
    terms = list(dict.fromkeys(key for _, log in logs for key in log if "/" in key))
    if not terms:
        return None
    terms.sort(key=lambda key: (key.endswith("grad_norm"), "latent" in key))
    last = max(log["images"].max() for _, log in logs)
    unit, name = (1000, "Training images (thousands)") if last >= 10_000 else (1, "Training images")
    with style():
        shown = [*terms, *keys]
        rows = -(-len(shown) // 3)
        figure = Figure(figsize=(7.0, 0.5 + 1.35 * rows))
        axes = figure.subplots(rows, 3, sharex=True, squeeze=False)
        for ax, key in zip(axes.flat, shown, strict=False):
            _curves(ax, key, logs, unit)
            if log_axis and key in terms and _is_wide(key, logs):
                _make_logarithmic(ax)
            else:
                ax.locator_params(nbins=4)
        for ax in axes.flat[len(shown) :]:
            ax.set_visible(False)
        figure.supxlabel(name, fontsize=8)
        handles = {name: h for ax in axes.flat for h, name in zip(*ax.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    return figure


def _is_wide(key: str, logs: Sequence[tuple[str, pd.DataFrame]]) -> bool:
    """Whether a loss or a norm is positive everywhere and ranges over a factor that a logarithm makes readable."""
    values = pd.concat([log[key].dropna() for _, log in logs if key in log])
    return "latent" not in key and values.min() > 0 and values.max() >= WIDE * values.min()


def _make_logarithmic(ax: Axes) -> None:
    """A logarithmic axis with plain numbers, of which one at least is in a range of a factor of WIDE."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _curves(ax: Axes, key: str, logs: Sequence[tuple[str, pd.DataFrame]], unit: int) -> None:
    """One panel: ``key`` of every log that has it; one without a label is not in the legend."""
    for index, (label, log) in enumerate(logs):
        if key in log:
            marks = look(index) | {"marker": ""}
            marks.pop("elinewidth"), marks.pop("markerfacecolor")
            known = log[log[key].notna()]
            ax.plot(known["images"] / unit, known[key], label=mathtext(label), **marks)
    ax.set_title(key)
