"""How a number of the catalogue is shown: heading, axis, direction and display factor. Records hold raw values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ablations.grid import Grid
from analysis.labels import stacked_tex
from core.catalogue import METRICS, READINGS, REPORTED, Quantity
from core.schema import check_choice

ARROWS = {"min": "↓", "max": "↑", "": ""}


@dataclass(frozen=True)
class Column:
    """A quantity of the catalogue as a column or an axis: a shown value is ``factor`` times the raw one.

    ``better`` is min or max where the best value is marked, and empty where none is.
    """

    quantity: Quantity
    better: str

    @property
    def metric(self) -> str:
        return self.quantity.name

    @property
    def label(self) -> str:
        return self.quantity.label

    @property
    def meaning(self) -> str:
        return self.quantity.meaning

    @property
    def power(self) -> int:
        return self.quantity.power

    @property
    def factor(self) -> float:
        return 10.0**self.power

    @property
    def arrow(self) -> str:
        return ARROWS[self.better]

    @property
    def heading(self) -> str:
        """Plain-text heading, e.g. ``Kernel distance ×10³ ↓``."""
        return _joined(self.label, superscript(self.power), self.arrow)

    @property
    def tex_heading(self) -> str:
        """The heading in LaTeX, a long one on two lines."""
        return stacked_tex(self.heading)

    @property
    def axis(self) -> str:
        """Axis label in matplotlib's mathtext."""
        times = rf"$\times 10^{{{self.power}}}$" if self.power > 0 else ""
        return _joined(self.label, times, self.arrow)


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def superscript(power: int) -> str:
    """``×10³``, or nothing for power 0 and for a unit."""
    return "×10" + str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) if power > 0 else ""


def column(name: str) -> Column:
    """The display of a quantity of the catalogue, with its own direction; UserError names an unknown one."""
    known = {**METRICS, **READINGS, **REPORTED}
    check_choice("metric", name, known)
    return Column(known[name], known[name].better)


def shown_column(grid: Grid, name: str) -> Column:
    """The display of ``name`` in ``grid``, which says whether its best value is marked."""
    shown = column(name)
    return shown if name in grid.layout.best else Column(shown.quantity, better="")


def glossary() -> Iterator[str]:
    """A Markdown table that explains every metric, line by line."""
    yield "| Metric | Key | What it is | Judge | Its weights | What it can tell |"
    yield "|---|---|---|---|---|---|"
    for metric in METRICS.values():
        heading, judge = column(metric.name).heading, metric.judge
        cells = (heading, f"`{metric.name}`", metric.meaning, judge.network, judge.weights, metric.resolves)
        yield f"| {' | '.join(cells)} |"
