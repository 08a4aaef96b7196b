"""Quality against what a student's training cost: evaluations of teacher and student, and device-hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.artefacts.context import Context, Piece, figure, logs, measured
from analysis.captions import notes
from analysis.collect import Results
from analysis.columns import column, shown_column
from analysis.labels import mathtext
from analysis.looks import legend_above, look, style
from analysis.stats import Summary, summarize
from analysis.training import by_seed
from core.catalogue import DEVICE_HOURS, KD_EFFNET, STUDENT_EVALUATIONS, TEACHER_EVALUATIONS

COSTS = (TEACHER_EVALUATIONS.name, STUDENT_EVALUATIONS.name, DEVICE_HOURS.name)
METRIC, SPLIT, NFE = KD_EFFNET.name, "train", 2


def build(context: Context) -> Iterator[Piece]:
    """Yield one figure over all grids that share a training budget."""
    grids = {name: of for name, of in context.grids.items() if name.startswith("flash_")}
    frames = [of.shared for of in grids.values()]
    shown = pd.concat([f[(f["metric"] == METRIC) & (f["split"] == SPLIT)] for f in frames])
    text = (
        f"Kernel distance of the students at {NFE} NFE against the cost of their training: network evaluations of the "
        "teacher (those that a store has saved included) and of the student for each training image, and device-hours "
        "as they were spent (stored solutions were free). Each point is a row of a grid, mean and standard deviation "
        "over seeds."
    )
    first = next(iter(grids.values()))
    caption = " ".join([text, *notes(shown, (shown_column(first.grid, METRIC),))])
    reads = [file for of in grids.values() for file in logs(of)]
    yield from figure("cost", draw, grids, caption=caption, reads=reads)


def draw(grids: Mapping[str, Results]) -> Figure:
    """Draw three panels across a page, 7.0 inches wide."""
    with style():
        figure = Figure(figsize=(7.0, 2.0))
        axes = figure.subplots(1, len(COSTS), sharey=True)
        for index, of in enumerate(grids.values()):
            quality = measured(of, SPLIT, NFE)
            for ax, cost in zip(axes, COSTS, strict=True):
                points = list(_points(of, quality, cost))
                marks = look(index) | {"linestyle": ""}
                ax.errorbar(
                    [x for x, _, _ in points], [y for _, y, _ in points], yerr=[sd for _, _, sd in points],
                    label=mathtext(of.grid.title), **marks,
                )  # fmt: skip
        for ax, cost in zip(axes, COSTS, strict=True):
            ax.set_xlabel(column(cost).axis + (" per image" if cost.endswith("evaluations") else ""))
        axes[0].set_ylabel(f"{column(METRIC).label} at {NFE} NFE ↓")
        handles, labels = axes[0].get_legend_handles_labels()
        legend_above(figure, dict(zip(labels, handles, strict=True)), 4)
    return figure


def _points(of: Results, quality: Mapping[tuple[str, str], Summary], cost: str) -> Iterator[tuple[float, float, float]]:
    """(cost, KD, its standard deviation) of every row that has both."""
    for row in of.grid.rows:
        costs, found = by_seed(of.items, row.id, cost), quality.get((row.id, METRIC))
        if costs and found:
            yield summarize(list(costs.values())).mean, found.mean, found.sd if found.n > 1 else 0.0
