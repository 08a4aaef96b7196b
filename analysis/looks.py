"""The house style of every figure: colours, markers, dashes, legends and labels that fit. Equal input, equal bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

STYLE = Path(__file__).parent / "style.mplstyle"
# A figure that is part of a page takes the page's colours, so that it follows its light or dark theme.
INK, FAINT, PAPER = "#010203", "#dcdddf", "#fffffe"
GREY = "#7f7f7f"
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
    (0, (5, 1.2, 1.2, 1.2, 1.2, 1.2)),
    (0, (2.5, 1)),
    (0, (1.2, 2.5)),
)
LABEL_SIZE, LEGEND_SIZE = 8.0, 7.0  # points, as in the style's file
MARK_INCHES = 0.55  # what a line's sample and the spaces around it take of a column of the legend
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


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the ``index``-th row; open markers for every second one.

    No two of the first 64 rows share colour and marker, or colour and dash: each time that the colours begin anew,
    markers and dashes are one further on.
    """
    count = len(COLOURS)
    colour, other = COLOURS[index % count], (index + index // count) % count
    return {
        "color": colour,
        "marker": MARKERS[other],
        "linestyle": DASHES[other],
        "markerfacecolor": colour if index % 2 == 0 else PAPER,
        "elinewidth": 0.7,
    }


def legend_above(figure: Figure, handles: Mapping[str, Any], most: int) -> None:
    """A legend over the panels, by label, in at most ``most`` columns; the figure grows by its height.

    It has as many columns as fit; where two do not, long labels continue on a second line.
    """
    if not handles:
        return
    legend = _fitting(figure, handles, most)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi + 0.05)


def _fitting(figure: Figure, handles: Mapping[str, Any], most: int) -> Legend:
    for count in range(min(most, len(handles)), 1, -1):
        lines = -(-len(handles) // count)
        legend = _legend(figure, handles, -(-len(handles) // lines))  # columns of equal length, if fewer
        if legend.get_window_extent().width <= figure.bbox.width:
            return legend
        legend.remove()
    count = min(2, len(handles))
    room = figure.get_figwidth() / count - MARK_INCHES
    return _legend(figure, {wrapped(figure, label, room, LEGEND_SIZE): h for label, h in handles.items()}, count)


def _legend(figure: Figure, handles: Mapping[str, Any], columns: int) -> Legend:
    return figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)


def wrapped(figure: Figure, label: str, inches: float, size: float) -> str:
    """``label`` on as many lines as keep it within ``inches`` at ``size`` points; mathematics is never divided."""
    lines, line = [], ""
    for word in re.findall(r"(?:[^\s$]|\$[^$]*\$)+", label):
        for part in _divided(figure, word, inches, size):
            longer = f"{line} {part}".strip()
            if line and _width(figure, longer, size) > inches:
                lines.append(line)
                longer = part
            line = longer
    return "\n".join([*lines, line])


def _divided(figure: Figure, word: str, inches: float, size: float) -> Iterator[str]:
    """The word, in parts of equal length if it is wider than a line."""
    count = 1 if "$" in word else -(-_width(figure, word, size) // inches)
    length = -(-len(word) // int(count))
    yield from (word[start : start + length] for start in range(0, len(word), length))


def _width(figure: Figure, label: str, size: float) -> float:
    """The inches that a line of text takes."""
    text = Text(0, 0, label, fontsize=size, figure=figure)
    return text.get_window_extent().width / figure.dpi


def label_outer(axes: np.ndarray) -> None:
    """Numbers at the lowest panel of each column and the leftmost of each row, whichever were left out."""
    for panels in axes.T:
        _first_shown(reversed(panels)).tick_params(labelbottom=True)
    for panels in axes:
        _first_shown(panels).tick_params(labelleft=True)


def _first_shown(panels: Iterable[Axes]) -> Axes:
    """The first panel that was not left out, or the first of all."""
    panels = list(panels)
    return next((ax for ax in panels if ax.axison), panels[0])
