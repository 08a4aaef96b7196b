"""Curves of what trainings have logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ablations.grid import Grid
from analysis.collect import CellRun
from analysis.labels import mathtext
from analysis.looks import LABEL_SIZE, label_outer, legend_above, look, style

WIDE = 5  # ratio of the largest value to the smallest from which a logarithmic axis helps
# Label, place in the grid and log of each row
Logs = Sequence[tuple[str, int, pd.DataFrame]]


def training_curves(grid: Grid, items: Sequence[CellRun]) -> Figure | None:
    """``log_curves`` of the first seed of each row; None without logs."""
    return log_curves(first_logs(grid, items))


def log_curves(logs: Logs, more: Sequence[str] = (), *, log_axis: bool = False) -> Figure | None:
    """Losses and gradient norms of every player against training images, one curve for each log; None without any.

    ``more``: further numbers of the logs. ``log_axis``: for losses and norms that range over orders of magnitude. What
    has no label is not in the legend.
    """
    terms = list(dict.fromkeys(key for _, _, log in logs for key in log if "/" in key))
    if not terms:
        return None
    terms.sort(key=lambda key: (key.endswith("grad_norm"), "latent" in key))
    last = max(log["images"].max() for _, _, log in logs)
    unit, name = (1000, "Training images (thousands)") if last >= 10_000 else (1, "Training images")
    with style():
        keys = [*terms, *more]
        rows = -(-len(keys) // 3)
        figure = Figure(figsize=(7.0, 0.3 + 1.3 * rows))
        axes = figure.subplots(rows, 3, sharex=True, squeeze=False)
        handles: dict[str, Any] = {}
        for ax, key in zip(axes.flat, keys, strict=False):
            handles |= _log_lines(ax, logs, key, unit)
            if log_axis and key in terms and _is_wide(key, logs):
                _make_logarithmic(ax)
            else:
                ax.locator_params(nbins=4)
        for ax in axes.flat[len(keys) :]:
            ax.set_axis_off()
        label_outer(axes)
        figure.supxlabel(name, fontsize=LABEL_SIZE)
        legend_above(figure, {mathtext(label): handles[mathtext(label)] for label, _, _ in logs if label}, 4)
    return figure


def _is_wide(key: str, logs: Logs) -> bool:
    """Whether a loss or a norm is positive everywhere and ranges over a factor that a logarithm makes readable."""
    values = pd.concat([log[key].dropna() for _, _, log in logs if key in log])
    return "latent" not in key and values.min() > 0 and values.max() >= WIDE * values.min()


def _make_logarithmic(ax: Axes) -> None:
    """A logarithmic axis with plain numbers, of which one at least is in a range of a factor of WIDE."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def first_logs(grid: Grid, items: Sequence[CellRun]) -> Logs:
    """The logs of the first seed of each row that has logged a loss."""
    first: dict[str, CellRun] = {}
    for item in items:
        if item.first is not None:
            first.setdefault(item.cell.row, item)
    logs = []
    for index, row in enumerate(grid.rows):
        log = pd.DataFrame(first[row.id].first.run.metrics() if row.id in first else [])
        if any("/" in key for key in log):
            logs.append((row.label, index, log))
    return logs


def _log_lines(ax: Axes, logs: Logs, key: str, unit: int) -> dict[str, Any]:
    """Draw one logged quantity of every row that has it; a single value is a point, as no line goes through it."""
    handles = {}
    for label, index, log in logs:
        if key not in log:
            continue
        known = log[log[key].notna()]
        marks = {name: value for name, value in look(index).items() if name in ("color", "linestyle")}
        marks["marker"] = look(index)["marker"] if len(known) == 1 else ""
        (handles[mathtext(label)],) = ax.plot(known["images"] / unit, known[key], **marks)
    ax.set_title(key.replace("/", ": ").replace("_", " "))
    return handles
