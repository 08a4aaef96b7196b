"""Figures 2 and 11 of Flash Diffusion: pi(t) in every stage of the training, and the alternatives of the ablation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.artefacts.context import Context, Piece, figure
from analysis.looks import style
from core.config import compose
from core.diffusion.timesteps import timestep_pmf

EXPERIMENT = "flash/sd15"
BAR, SAMPLED = "#9fb8c8", "#0072B2"
KINDS = {"uniform": "uniform", "gaussian": "gaussian", "sharp": "sharp", "mixture": "ours"}


def build(context: Context) -> Iterator[Piece]:
    """Yield both figures, from the configuration of the paper's own experiment."""
    method = compose(EXPERIMENT, ["data.path=none"]).method
    count, variance = method.num_timesteps, method.mixture_variance
    stages = [timestep_pmf("mixture", count, weights, variance) for weights in method.stage_weights]
    titles = [f"Stage {index}" for index in range(1, len(stages) + 1)]
    shared = (
        f"K = {count} timesteps, from full noise (left) to the data; dark: the four timesteps that 1, 2 and 4 sampling "
        f"steps visit. Modes of variance {variance:g} squared index steps (Equation 7); a mode at full noise has only "
        "its right half. Computed from the configuration of flash/sd15, no run is needed."
    )
    text = "The distribution of training timesteps in each quarter of the budget (after Flash Diffusion, Figure 2). "
    yield from figure("figure_2", draw, stages, titles, caption=text + shared)

    last = method.stage_weights[-1]
    variants = [timestep_pmf(kind, count, last, variance) for kind in KINDS]
    titles = [rf"$\pi^{{\mathrm{{{name}}}}}(t)$" for name in KINDS.values()]
    text = "The distributions of the ablation, in the last stage (after Flash Diffusion, Figure 11). "
    yield from figure("figure_11", draw, variants, titles, caption=text + shared)


def draw(masses: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """Draw four panels with one y axis, 3.4 x 2.4 inches in total."""
    with style():
        figure = Figure(figsize=(3.4, 2.4))
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        for ax, mass, title in zip(axes.flat, masses, titles, strict=True):
            _bars(ax, mass)
            ax.set_title(title)
        figure.supxlabel("Index of the timestep (0: full noise)", fontsize=8)
        figure.supylabel("Probability", fontsize=8)
    return figure


def _bars(ax: Axes, mass: np.ndarray) -> None:
    count = len(mass)
    colours = [SAMPLED if index % (count // 4) == 0 else BAR for index in range(count)]
    ax.bar(range(count), mass, width=0.85, color=colours)
    ax.set_xticks(range(0, count, count // 4))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="x", visible=False)
