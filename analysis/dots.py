"""Panels of dots: one line a row, its mean over seeds and its spread along the other axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.render import number
from analysis.stats import Summary

FAR = 8.0  # interquartile ranges beyond which a value does not decide about the axis


@dataclass(frozen=True)
class Dot:
    """One line of a panel; ``summary`` None: nobody has measured it. ``marks``: colour, marker and its face."""

    summary: Summary | None
    marks: dict[str, Any]


def limits(found: Sequence[Summary], far: float = FAR) -> tuple[float, float]:
    """An axis for most of the values: what lies ``far`` interquartile ranges out is drawn at its border."""
    if not found:
        return 0.0, 1.0
    means = np.array([s.mean for s in found])
    low, high = np.quantile(means, [0.25, 0.75])
    reach = far * (high - low) + 1e-9
    ends = []
    for one in found:
        if low - reach <= one.mean <= high + reach:
            ends += [one.mean - spread(one), one.mean + spread(one)]
    margin = 0.06 * (max(ends) - min(ends)) + 1e-9
    return min(ends) - margin, max(ends) + margin


def spread(found: Summary) -> float:
    """The standard deviation; none of a single seed."""
    return found.sd if found.n > 1 else 0.0


def draw_dots(ax: Axes, dots: Sequence[Dot], ends: tuple[float, float], digits: int) -> None:
    """Draw the first of ``dots`` on top; one beyond ``ends`` is an arrow at the border with its number."""
    for y, dot in enumerate(dots):
        _draw(ax, y, dot, ends, digits)
    ax.set_xlim(ends)
    ax.set_ylim(len(dots) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(3))


def _draw(ax: Axes, y: int, dot: Dot, ends: tuple[float, float], digits: int) -> None:
    found = dot.summary
    if found is None:
        ax.text(0.5, y, "no run", transform=ax.get_yaxis_transform(), ha="center", va="center", fontsize=6)
    elif not ends[0] <= found.mean <= ends[1]:
        right = found.mean > ends[1]
        ax.plot(ends[right], y, ">" if right else "<", color=dot.marks["color"], clip_on=False)
        ax.annotate(number(found, digits).replace("-", "−"), (ends[right], y), (-6 if right else 6, 0), fontsize=6,
                    textcoords="offset points", ha="right" if right else "left", va="center")  # fmt: skip
    else:
        ax.errorbar(found.mean, y, xerr=spread(found) if found.n > 1 else None, **dot.marks)
