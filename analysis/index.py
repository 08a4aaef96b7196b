"""The index page of ``fewstep results``: every table and figure on one page, each with links to its files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from analysis.artefacts.context import Context
from analysis.artefacts.grids import TRAINING
from analysis.labels import without_math
from analysis.report import html_template

FILE = "index.html"


@dataclass(frozen=True)
class Entry:
    """An artefact: one or more files of a name. ``table`` is an HTML fragment, ``figure`` the name of a PNG."""

    name: str
    title: str
    source: str
    caption: str
    table: str
    figure: str
    files: tuple[str, ...]

    @property
    def is_listed(self) -> bool:
        """Whether the list at the page's top names it; training curves follow their grid."""
        return not self.name.endswith(TRAINING)


def index_page(written: Mapping[str, str | bytes], context: Context) -> str:
    """HTML that shows what was written beside it: grid by grid, then figures of several grids.

    ``written``: contents by file name.
    """
    entries = [_entry(name, written, context) for name in _names(written)]
    grids = [entry for entry in entries if entry.name.removesuffix(TRAINING) in context.grids]
    others = [entry for entry in entries if entry not in grids]
    return html_template(f"{FILE}.j2").render(entries=[*grids, *others])


def _names(written: Mapping[str, str | bytes]) -> Iterator[str]:
    """The artefacts in the order in which they were written."""
    yield from dict.fromkeys(PurePath(file).stem for file in written)


def _entry(name: str, written: Mapping[str, str | bytes], context: Context) -> Entry:
    files = tuple(file for file in written if PurePath(file).stem == name)
    caption, table = (str(written.get(f"{name}.{suffix}", "")).strip() for suffix in ("txt", "html"))
    of = context.grids.get(name)
    return Entry(
        name=name,
        title=_title(name, caption, context),
        source="" if of is None else of.grid.source,
        caption=caption,
        table=table,
        figure=f"{name}.png" if f"{name}.png" in files else "",
        files=files,
    )


def _title(name: str, caption: str, context: Context) -> str:
    """The grid's title, the beginning of another figure's caption, or the name in words."""
    grid = context.grids.get(name.removesuffix(TRAINING))
    if grid is not None:
        return without_math(grid.grid.title) + (", in training" if name.endswith(TRAINING) else "")
    sentence = re.split(r":\s|\.\s(?=[A-Z])|\.$", caption)[0]  # not at "Sec. 4.2"
    return sentence or name.replace("_", " ").replace("-paper", ", at paper scale").capitalize()
