"""Figure 5 of Flash Diffusion: its six ablations at 2 NFE, each row's distribution distance and alignment.

Five panels compare named choices (dots, one line a choice; all panels share one axis, so that effects can be compared
across panels); the last one is a curve over the fixed guidance of training, with the range as a point of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.artefacts.context import Context, Piece, figure, measured
from analysis.captions import notes
from analysis.collect import Results, comparable
from analysis.columns import Column, shown_column
from analysis.dots import Dot, draw_dots, limits, spread
from analysis.labels import mathtext
from analysis.looks import PAPER, style
from analysis.stats import Summary
from core.catalogue import CLIP_SCORE, KD_EFFNET
from core.splits import captions

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
FAR = 3.0  # of many rows: nearer than in a grid's figure, so that effects within panels stay visible


def build(context: Context) -> Iterator[Piece]:
    """Yield one figure for each split of captions."""
    grids = {name: context.grids[name] for name in (*(name for name, _, _ in PANELS), GUIDANCE)}
    for split in grids[GUIDANCE].grid.layout.splits:
        name = "figure_5" if split == "train" else f"figure_5-{split}"
        yield from figure(name, draw, grids, split, caption=caption(grids, split))


def draw(grids: Mapping[str, Results], split: str) -> Figure:
    """Draw one column of a paper, 3.4 x 7.6 inches."""
    numbers = {name: measured(grids[name], split, NFE) for name in (*(name for name, _, _ in PANELS), GUIDANCE)}
    heights = [1.2 + len(grids[name].grid.rows) for name, _, _ in PANELS] + [6.5]
    with style():
        figure = Figure(figsize=(3.4, 7.6))
        axes = figure.subplots(len(heights), 2, gridspec_kw={"height_ratios": heights})
        for column, metric in enumerate(METRICS):
            ends = limits([numbers[name][row.id, metric] for name, _, _ in PANELS
                           for row in grids[name].grid.rows if (row.id, metric) in numbers[name]], FAR)  # fmt: skip
            for row, (name, _, proposed) in zip(axes, PANELS, strict=False):
                _dots(row[column], grids[name], numbers[name], metric, proposed, ends)
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


def _dots(
    ax: Axes,
    of: Results,
    numbers: Mapping[tuple[str, str], Summary],
    metric: str,
    proposed: str,
    ends: tuple[float, float],
) -> None:
    dots = []
    for row in of.grid.rows:
        ours = row.id == proposed
        marks = {"color": OURS, "fmt": "D"} if ours else {"color": OTHERS, "fmt": "o", "markerfacecolor": PAPER}
        dots.append(Dot(numbers.get((row.id, metric)), marks | {"elinewidth": 0.9}))
    draw_dots(ax, dots, ends, DIGITS[metric])
    ax.set_yticks([])
    ax.tick_params(labelbottom=False)


def _curve(ax: Axes, of: Results, numbers: Mapping[tuple[str, str], Summary], metric: str) -> None:
    """Means over seeds at each fixed guidance; the range as a bar from end to end with its own marker."""
    methods = _methods(of)
    points = sorted((method.guidance_min, row) for row, method in methods.items() if row != RANGE)
    known = [(w, numbers[row, metric]) for w, row in points if (row, metric) in numbers]
    ax.errorbar(
        [w for w, _ in known], [s.mean for _, s in known], yerr=[spread(s) for _, s in known],
        fmt="o-", color=OTHERS, markerfacecolor=PAPER, markersize=3.2, elinewidth=0.9, capsize=2, label="fixed",
        zorder=3,
    )  # fmt: skip
    if (RANGE, metric) in numbers:
        found, method = numbers[RANGE, metric], methods[RANGE]
        middle, half = (method.guidance_min + method.guidance_max) / 2, (method.guidance_max - method.guidance_min) / 2
        # wider and below: a fixed value in the middle of the range lies on it
        ax.plot([middle - half, middle + half], [found.mean] * 2, color=OURS, linewidth=3.5, alpha=0.4, zorder=1)
        ax.errorbar(
            middle, found.mean, yerr=spread(found), fmt="D", color=OURS, markersize=6.5,
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
            f"Six ablations of Flash Diffusion (after its Figure 5), students at 2 NFE, {captions(split)}.",
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
