"""``fewstep results``: every table and figure of the project from committed records, without torch or a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from analysis import index, manifest, spread
from analysis.artefacts import budgets, cost, figure_5, grids, samples, timesteps
from analysis.artefacts.context import Context, File, finished
from analysis.collect import RECORDS
from analysis.pages import FOLDER, build_pages
from core.run import atomic_write

ARTEFACTS = (timesteps, samples, figure_5, cost, budgets, grids)


def write_results(out: Path, runs_dir: Path | None = None, pages: Path | None = None) -> Iterator[Path]:
    """Write all artefacts and an index page to ``out``; equal records give equal bytes.

    ``runs_dir``: runs that are not records yet. ``pages``: where to write the result pages, too.
    """
    manifest.check(RECORDS.parent)
    context = Context((RECORDS,) if runs_dir is None else (runs_dir, RECORDS))
    if pages is not None:
        yield from _write_spread(pages, context)
    written: dict[str, str | bytes] = {}
    for artefact in ARTEFACTS:
        for name, content in finished(artefact.build(context)):
            written[name] = content
            yield from _write(out, [(name, content)])
    yield from _write(out, [(index.FILE, index.index_page(written, context))])
    if pages is not None:
        yield from _write(pages, build_pages(context))


def write_pages(folder: Path = FOLDER) -> Iterator[Path]:
    """Write the result pages alone, from the committed records."""
    manifest.check(RECORDS.parent)
    context = Context((RECORDS,))
    yield from _write_spread(folder, context)
    yield from _write(folder, build_pages(context))


def _write_spread(folder: Path, context: Context) -> Iterator[Path]:
    """Write the spread of seeds, with which everything that comes after is judged."""
    yield from _write(folder, [(spread.FILE.name, context.spread)])
    spread.load.cache_clear()


def _write(folder: Path, files: Iterable[File]) -> Iterator[Path]:
    for name, content in files:
        atomic_write(folder / name, content)
        yield folder / name
