"""Two time scales over training: quality on the three axes of a budget, and the steadiness of the student's loss.

At equal iterations a larger ratio leaves the student fewer updates; on the axis of the student's images it gets more
work of the fake score for free; evaluations of networks are what is paid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.artefacts.context import Context, Piece, figure, logs
from analysis.artefacts.grids import has_students
from analysis.captions import notes
from analysis.collect import CellRun, Results
from analysis.columns import shown_column
from analysis.labels import mathtext
from analysis.looks import legend_above, look, style
from analysis.stats import Summary, summarize
from analysis.training import equal_means, variation
from core.catalogue import KD_EFFNET
from core.metrics.protocol import comparable_id
from core.run import Run

GRID, METRIC, SPLIT, LOSS = "dmd2_ttur", KD_EFFNET.name, "train", "student/dmd"
WINDOWS = 4  # parts of the training, in each of which the loss's variation is taken: 10:1 has few updates
AXES = {"iteration": "Iterations", "student_images": "Student images", "evaluations": "Network evaluations"}


def build(context: Context) -> Iterator[Piece]:
    """The figure; nothing as long as no run of the grid has been measured."""
    of = context.grids[GRID]
    if not has_students(of):
        return
    frame = of.shared
    shown = frame[(frame["metric"] == METRIC) & (frame["split"] == SPLIT)]
    text = (
        f"{of.grid.title} (after {of.grid.source}): kernel distance at {of.grid.layout.nfe[0]} NFE over the training, "
        "at equal iterations, at equal images that the student has learned from, and at equal network evaluations of "
        "all roles (in thousands); means and standard deviations over seeds. Right: standard deviation over mean of "
        f"the student's loss in {WINDOWS} parts of the training, of all seeds together, each value a mean over equally "
        "many of the student's updates."
    )
    caption = " ".join([text, *notes(shown, (shown_column(of.grid, METRIC),))])
    yield from figure("budgets", draw, of, caption=caption, reads=logs(of))


def draw(of: Results) -> Figure:
    """Draw four panels across a page, 7.0 inches wide."""
    with style():
        figure = Figure(figsize=(7.0, 2.2))
        *quality, steadiness = figure.subplots(1, len(AXES) + 1)
        for index, row in enumerate(of.grid.rows):
            points = moments(of, row.id)
            for ax, axis in zip(quality, AXES, strict=True):
                _line(ax, {at[axis] / 1000: found for at, found in points}, index, mathtext(row.label))
            runs = [item.first.run for item in _finished(of, row.id)]
            _line(steadiness, _steadiness(runs), index, mathtext(row.label))
        for ax, name in zip(quality, AXES.values(), strict=True):
            ax.set_xlabel(f"{name} (thousands)")
            ax.sharey(quality[0])
        for ax in quality[1:]:
            ax.tick_params(labelleft=False)
        quality[0].set_ylabel(shown_column(of.grid, METRIC).axis)
        steadiness.set(xlabel="Fraction of the budget", ylabel="Variation of the loss", ylim=(0, None))
        handles, labels = quality[0].get_legend_handles_labels()
        legend_above(figure, dict(zip(labels, handles, strict=True)), 4)
    return figure


def _line(ax: Any, points: dict[float, Summary], index: int, label: str) -> None:
    spread = [s.sd if s.n > 1 else 0.0 for s in points.values()]
    ax.errorbar(list(points), [s.mean for s in points.values()], yerr=spread, label=label, **look(index))


def moments(of: Results, row: str) -> list[tuple[dict[str, float], Summary]]:
    """(place on every axis, quality over seeds) of each moment at which most runs of a row were measured.

    A point of one seed among points of three would bend the line.
    """
    frame, nfe, runs = of.shared, of.grid.layout.nfe[0], _finished(of, row)
    judged = set(frame.loc[(frame["metric"] == METRIC) & (frame["split"] == SPLIT), "comparable"].dropna())
    places: dict[int, dict[str, float]] = {}
    values: dict[int, dict[int, float]] = defaultdict(dict)
    for item in runs:
        run, weights = item.first.run, item.cell.config.eval.weights
        for line in run.evals():
            asked = (METRIC, SPLIT, nfe, weights)
            if (line["metric"], line["split"], line["nfe"], line["weights"]) != asked:
                continue
            if comparable_id(line["protocol_fields"]) not in judged:
                continue
            values[line["images"]][item.cell.seed] = line["value"]
            places[line["images"]] = _place(run, line["images"])
    shared = sorted(images for images, found in values.items() if 2 * len(found) > len(runs))
    return [(places[images], summarize(list(values[images].values()))) for images in shared]


def _finished(of: Results, row: str) -> list[CellRun]:
    return [item for item in of.items if item.cell.row == row and item.state == "done"]


def _place(run: Run, images: int) -> dict[str, float]:
    """Counters of the log where ``images`` samples had been drawn, between its two nearest lines."""
    log = pd.DataFrame(
        [{"images": 0, "iteration": 0, "student_images": 0, "evaluations": 0}, *map(_flat, run.metrics())]
    )
    log = log.drop_duplicates("images", keep="last").set_index("images").sort_index()
    if images not in log.index:
        log = log.reindex(log.index.union([images])).interpolate("index")
    return log.loc[images].to_dict()


def _flat(line: dict[str, Any]) -> dict[str, float]:
    evaluations = sum(line["evaluations"].values()) + line.get("stored_evaluations", 0)
    return {key: line[key] for key in ("images", "iteration", "student_images")} | {"evaluations": evaluations}


def _steadiness(runs: list[Run]) -> dict[float, Summary]:
    """Variation of the loss in each of WINDOWS parts, all seeds' points together, by the middle of the part."""
    parts: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for at, value in equal_means(run, LOSS):
            parts[int(at * WINDOWS)].append(value)
    found = {}
    for window in range(WINDOWS):
        if len(parts[window]) > 1:
            found[(window + 0.5) / WINDOWS] = summarize([variation(parts[window])])
    return found
