"""``fewstep results``: every table and figure of the project from committed records, without torch or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from analysis.artefacts import budgets, cost, figure_5, grids, samples, timesteps
from analysis.artefacts.context import Context
from analysis.collect import RECORDS
from core.run import atomic_write

ARTEFACTS = (timesteps, samples, figure_5, cost, budgets, grids)


def write_results(out: Path, runs_dir: Path | None = None) -> Iterator[Path]:
    """Write all artefacts to ``out``; equal records give equal bytes. ``runs_dir``: runs that are not records yet."""
    context = Context((RECORDS,) if runs_dir is None else (runs_dir, RECORDS))
    for artefact in ARTEFACTS:
        for name, content in artefact.build(context):
            atomic_write(out / name, content)
            yield out / name
