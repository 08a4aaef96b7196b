"""Figure 5 of Flash Diffusion: its six ablations at 2 NFE, each row's distribution distance and alignment.

Five panels compare named choices (dots, one line a choice; all panels share one axis, so that effects can be compared
across panels); the last one is a curve over the fixed guidance of training, with the range as a point of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.artefacts.context import Context, File, figure_files, measured
from analysis.captions import notes
from analysis.collect import Results, comparable
from analysis.columns import Column, shown_column
from analysis.figures import PAPER, TITLES, style
from analysis.labels import mathtext
from analysis.render import number
from analysis.stats import Summary
from core.catalogue import CLIP_SCORE, KD_EFFNET

METRICS = (KD_EFFNET.name, CLIP_SCORE.name)
DIGITS = {KD_EFFNET.name: 2, CLIP_SCORE.name: 3}
# Grid, title of its panel, and the row that the paper proposes.
PANELS = (
    ("flash_losses", "Loss terms", "all"),
    ("flash_gan_loss", "Adversarial loss", "lsgan"),
    ("flash_distill_loss", "Distillation loss", "mse"),
    ("flash_num_timesteps", "Timesteps $K$", "ours"),
    ("flash_timesteps", r"Distribution $\pi(t)$", "mixture"),
)
GUIDANCE, RANGE, MIDDLE = "flash_guidance", "range", "middle"
GUIDANCE_TITLE = r"Guidance of the teacher in training, $\omega$"
OURS, OTHERS = "#0072B2", "#5f5f5f"
NFE = 2


def build(context: Context) -> Iterator[File]:
    """Yield one figure for each split of captions."""
    for split in context.grids[GUIDANCE].grid.layout.splits:
        name = "figure_5" if split == "train" else f"figure_5-{split}"
        yield from figure_files(name, draw(context.grids, split), caption(context.grids, split))


def draw(grids: Mapping[str, Results], split: str) -> Figure:
    """Draw one column of a paper, 3.4 x 7.6 inches."""
    numbers = {name: measured(grids[name], split, NFE) for name in (*(name for name, _, _ in PANELS), GUIDANCE)}
    heights = [1.2 + len(grids[name].grid.rows) for name, _, _ in PANELS] + [6.5]
    with style():
        figure = Figure(figsize=(3.4, 7.6))
        axes = figure.subplots(len(heights), 2, gridspec_kw={"height_ratios": heights})
        for column, metric in enumerate(METRICS):
            limits = _limits([numbers[name][row.id, metric] for name, _, _ in PANELS
                              for row in grids[name].grid.rows if (row.id, metric) in numbers[name]])  # fmt: skip
            for row, (name, _, proposed) in zip(axes, PANELS, strict=False):
                _dots(row[column], grids[name], numbers[name], metric, proposed, limits)
            axes[-2][column].tick_params(labelbottom=True)
            shown = shown_column(grids[GUIDANCE].grid, metric)
            axes[0][column].set_title(shown.axis, fontsize=8)
            _curve(axes[-1][column], grids[GUIDANCE], numbers[GUIDANCE], metric)
        for row, letter, title in zip(axes, "abcdef", [*(t for _, t, _ in PANELS), GUIDANCE_TITLE], strict=True):
            row[0].annotate(rf"$\bf{{{letter}}}$  {title}", (0, 1), (-62, 3), xycoords="axes fraction",
                            textcoords="offset points", fontsize=7.5, fontweight="bold", va="bottom")  # fmt: skip
        for row, (name, _, _) in zip(axes, PANELS, strict=False):
            labels = [mathtext(r.label) for r in grids[name].grid.rows]
            row[0].set_yticks(range(len(labels)), labels, fontsize=6.5)
        axes[-1][1].legend(loc="lower right", fontsize=6.5, handlelength=1.6)
    return figure


def _limits(found: list[Summary]) -> tuple[float, float]:
    """An axis for most of the values: what lies further than three interquartile ranges out is drawn at its border."""
    if not found:
        return 0.0, 1.0
    means = np.array([s.mean for s in found])
    low, high = np.quantile(means, [0.25, 0.75])
    reach = 3 * (high - low) + 1e-9
    ends = []
    for one in found:
        if low - reach <= one.mean <= high + reach:
            spread = one.sd if one.n > 1 else 0.0
            ends += [one.mean - spread, one.mean + spread]
    margin = 0.06 * (max(ends) - min(ends)) + 1e-9
    return min(ends) - margin, max(ends) + margin


def _dots(
    ax: Axes,
    of: Results,
    numbers: Mapping[tuple[str, str], Summary],
    metric: str,
    proposed: str,
    limits: tuple[float, float],
) -> None:
    for y, row in enumerate(of.grid.rows):
        found, ours = numbers.get((row.id, metric)), row.id == proposed
        colour, face = (OURS, OURS) if ours else (OTHERS, PAPER)
        if found is None:
            ax.text(0.5, y, "no run", transform=ax.get_yaxis_transform(), ha="center", va="center", fontsize=6)
        elif not limits[0] <= found.mean <= limits[1]:
            right = found.mean > limits[1]
            ax.plot(limits[right], y, ">" if right else "<", color=colour, clip_on=False)
            ax.annotate(number(found, DIGITS[metric]), (limits[right], y), (-6 if right else 6, 0), fontsize=6,
                        textcoords="offset points", ha="right" if right else "left", va="center")  # fmt: skip
        else:
            ax.errorbar(found.mean, y, xerr=found.sd if found.n > 1 else None, fmt="D" if ours else "o",
                        color=colour, markerfacecolor=face, elinewidth=0.9)  # fmt: skip
    ax.set_xlim(limits)
    ax.set_ylim(len(of.grid.rows) - 0.4, -0.6)
    ax.set_yticks([])
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.tick_params(labelbottom=False)


def _curve(ax: Axes, of: Results, numbers: Mapping[tuple[str, str], Summary], metric: str) -> None:
    """Means over seeds at each fixed guidance; the range as a bar from end to end with its own marker."""
    methods = _methods(of)
    points = sorted((method.guidance_min, row) for row, method in methods.items() if row != RANGE)
    known = [(w, numbers[row, metric]) for w, row in points if (row, metric) in numbers]
    ax.errorbar(
        [w for w, _ in known], [s.mean for _, s in known], yerr=[s.sd if s.n > 1 else 0 for _, s in known],
        fmt="o-", color=OTHERS, markerfacecolor=PAPER, markersize=3.2, elinewidth=0.9, capsize=2, label="fixed",
        zorder=3,
    )  # fmt: skip
    if (RANGE, metric) in numbers:
        found, method = numbers[RANGE, metric], methods[RANGE]
        middle, half = (method.guidance_min + method.guidance_max) / 2, (method.guidance_max - method.guidance_min) / 2
        # wider and below: a fixed value in the middle of the range lies on it
        ax.plot([middle - half, middle + half], [found.mean] * 2, color=OURS, linewidth=3.5, alpha=0.4, zorder=1)
        ax.errorbar(
            middle, found.mean, yerr=found.sd if found.n > 1 else None, fmt="D", color=OURS, markersize=6.5,
            elinewidth=0.9, capsize=2, label="from a range", zorder=2,
        )  # fmt: skip
    ax.set_xlabel(r"$\omega$")
    ax.set_ylabel(shown_column(of.grid, metric).axis, fontsize=7)
    ticks = [w for w, row in points if row != MIDDLE]  # the paper's; between 3 and 5 there is no room for another
    ax.set_xticks(ticks, [f"{w:g}" for w in ticks], fontsize=6)


def _methods(of: Results) -> dict[str, Any]:
    """The method's settings of each row."""
    return {item.cell.row: item.cell.config.method for item in of.items}


def caption(grids: Mapping[str, Results], split: str) -> str:
    """The caption: what the panels show, which way the paper points, and what the numbers are."""
    first = grids[PANELS[0][0]]
    columns: tuple[Column, ...] = tuple(shown_column(first.grid, metric) for metric in METRICS)
    own = first.frame[first.frame["split"] == split]
    return " ".join(
        [
            f"Six ablations of Flash Diffusion (after its Figure 5), students at 2 NFE, {TITLES[split].lower()}.",
            "Left: kernel distance (the paper: FID), lower is better; right: CLIP score, higher is better. Filled",
            "diamonds: what the paper proposes and finds best (in a it finds that the adversarial term lowers FID and",
            "that the DMD term raises the CLIP score; in d that twice as many timesteps are about as good and half as",
            f"many slightly worse; here K = {_methods(grids['flash_num_timesteps'])['ours'].num_timesteps}). In c the",
            f"perceptual loss is {_methods(grids['flash_distill_loss'])['perceptual'].distill_loss}. Bars: standard",
            "deviation over training seeds, often smaller than the marker. Panels a to e share their axes; arrows: a",
            "value beyond them. In f the broad bar is the range that the guidance is drawn from (the paper's",
            "proposal); the paper finds that the CLIP score rises with the guidance and that FID eventually does.",
            *notes(comparable(own), columns),
        ]
    )
