"""Table, figure and training curves of every grid, Table 1 at the paper's scale, and the papers' claims."""

from __future__ import annotations

from collections.abc import Iterator

from ablations.grid import load
from analysis.artefacts.context import BUDGET, Context, File, Piece, figure
from analysis.collect import Results, results
from analysis.figures import caption, grid_figure
from analysis.log_curves import first_logs, log_curves
from analysis.render import FORMATS, claims_markdown, render
from analysis.tables import Table, build_table

TRAINING = "-training"  # ends the names of a grid's training curves
PAPER_TABLES = {  # at paper scale
    "few_steps": "table_1", "flash_table_2": "table_2", "flash_table_3": "table_3", "flash_table_4": "table_4",
}  # fmt: skip


def build(context: Context) -> Iterator[Piece]:
    """Yield the files of ``fewstep table``, ``figure`` and ``claims``, at the full budget."""
    for name, of in context.grids.items():
        table = context.tables[name]
        yield from _tables(name, table)
        if not has_students(of):  # the table names the runs that are missing; a figure of nothing says nothing
            continue
        yield from figure(name, grid_figure, of.grid, of.frame, caption=caption(of.grid, of.frame))
        logs = first_logs(of.grid, of.items)
        if logs:
            text = f"{of.grid.title}: losses and gradient norms in training, first seed of each row."
            yield from figure(f"{name}{TRAINING}", log_curves, logs, caption=text)
    for name, artefact in PAPER_TABLES.items():
        of = results(load(name), "paper", BUDGET, context.sources)
        yield from _tables(f"{artefact}-paper", build_table(of))
    yield "claims.md", claims_markdown(context.judgements)


def has_students(of: Results) -> bool:
    """Whether a trained run of the grid has been measured."""
    return bool((of.frame["value"].notna() & ~of.frame["reference"].astype(bool)).any())


def _tables(name: str, table: Table) -> Iterator[File]:
    for format in FORMATS:
        yield f"{name}.{format}", render(table, format)
