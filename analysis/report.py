"""One static, self-contained HTML page for a grid: it opens from disk, without a network."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from analysis.collect import CellRun, Results
from analysis.figures import caption, grid_figure
from analysis.keep_records import small_webp
from analysis.labels import to_html as label_html
from analysis.labels import without_math
from analysis.log_curves import training_curves
from analysis.looks import inline_svg
from analysis.render import JUDGEMENT_COLUMNS, judgement_cells, to_html
from analysis.tables import Table, build_table
from experiments.sheet import newest_sheet

TEMPLATES = Path(__file__).parent / "templates"
SHEET_BYTES = 120_000
STORED = "teacher, from the store"
COST_NOTE = (
    "Columns after device-hours count network evaluations of single samples by role, guidance's null pass "
    "included; teacher solutions taken from the shared store are counted apart, they cost nothing again."
)
INTRO = {
    "emoji": "All numbers are measured at emoji scale, on the embedded teacher: they are not comparable with "
    "the paper's numbers, but its directions are.",
    "tiny": "A random network stands in for the teacher: these numbers test the machinery and mean nothing else.",
}


@dataclass(frozen=True)
class Section:
    """Everything that the page shows of one budget."""

    budget: str
    heading: str
    table: Table
    table_html: str
    claims: list[dict[str, Any]]
    figure: str  # <svg>
    figure_caption: str
    curves: str
    samples: list[dict[str, str]]
    costs: list[dict[str, Any]]
    roles: list[str]
    cost_note: str
    provenance: list[dict[str, str]]


def build_report(budgets: Sequence[Results]) -> str:
    """The page of one grid, its budgets side by side; a later budget appears if a student of it was measured."""
    grid, scale = budgets[0].grid, budgets[0].scale
    sections = []
    for index, of in enumerate(budgets):
        if index == 0 or of.frame.loc[~of.frame["reference"], "value"].notna().any():
            sections.append(_section(of))
    return html_template("report.html.j2").render(
        grid=grid, scale=scale, sections=sections, intro=INTRO.get(scale, ""), claim_columns=JUDGEMENT_COLUMNS
    )


def html_template(name: str) -> jinja2.Template:
    """A page of ``templates/``; what is put into it is escaped unless marked safe."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def _section(of: Results) -> Section:
    grid, frame, items = of.grid, of.frame, of.items
    table = build_table(of)
    started = [item for item in items if item.first is not None]
    curves = training_curves(grid, items)
    costs = [_cost(item) for item in items]
    seeds = frame.loc[frame["value"].notna() & ~frame["reference"], "seed"].nunique()
    return Section(
        budget=table.budget,
        heading=f"{table.budget.capitalize()} budget, {seeds} seed{'s' if seeds != 1 else ''}",
        table=table,
        table_html=to_html(table),
        claims=list(_claims(table)),
        figure=inline_svg(grid_figure(grid, frame)),
        figure_caption=caption(grid, frame),
        curves="" if curves is None else inline_svg(curves),
        samples=list(_samples(started)),
        costs=costs,
        roles=list(dict.fromkeys(role for item in items for cost in costs for role in cost["evaluations"])),
        cost_note=COST_NOTE,
        provenance=[_provenance(item) for item in started],
    )


def sheet_uri(sheet: Path) -> str:
    """A sheet of pictures as the address of an image that is part of the page, small enough for a page of many."""
    return f"data:image/webp;base64,{base64.b64encode(small_webp(sheet, SHEET_BYTES)).decode()}"


def _samples(items: Sequence[CellRun]) -> Iterator[dict[str, str]]:
    """The newest sheet of the first seed of every row."""
    seen: set[str] = set()
    for item in items:
        sheet = newest_sheet(item.first.run.path) if item.first else None
        if sheet is None or item.cell.row in seen:
            continue
        seen.add(item.cell.row)
        yield {
            "label": label_html(item.cell.label),
            "alt": f"Sample sheet of {without_math(item.cell.label)}: teacher and student on fixed prompts",
            "after": f"seed {item.cell.seed}, after {int(sheet.stem):,} images" if sheet.stem.isdigit() else "",
            "uri": sheet_uri(sheet),
        }


def _cost(item: CellRun) -> dict[str, Any]:
    cost = item.cost
    return {
        "label": label_html(item.cell.label),
        "seed": item.cell.seed,
        "run": item.cell.id,
        "state": item.state,
        "images": f"{cost.images:,}",
        "hours": f"{cost.device_hours:.3g}" if cost.images else "",
        "evaluations": cost.evaluations | ({STORED: cost.stored} if cost.stored else {}),
        "dirty": bool(item.first and item.first.dirty),
    }


def _provenance(item: CellRun) -> dict[str, str]:
    assert item.first is not None
    run = {"run": item.cell.id, "experiment": item.cell.config.name}
    return run | origin(item.first.provenance) | {"settings": " ".join(item.cell.overrides)}


def origin(facts: Mapping[str, Any]) -> dict[str, str]:
    """Code, inputs and machine of a run, in words, from what was noted when it was made."""
    packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items() if version)
    changed = " + uncommitted changes" if facts.get("dirty_patch") else ""
    return {
        "commit": (facts.get("commit") or "not from a checkout")[:12] + changed,
        "weights": str(facts.get("weights_hash", ""))[:16],
        "data": str(facts.get("data_hash", ""))[:16],
        "created": str(facts.get("created", "")),
        "machine": f"{facts.get('platform', '')}, {facts.get('num_cpus', '?')} CPUs",
        "python": str(facts.get("python", "")),
        "packages": packages,
    }


def _claims(table: Table) -> Iterator[dict[str, Any]]:
    """Lines of the table of claims: its cells and the tone of the verdict."""
    tones = {"reproduced": "good", "contradicted": "bad"}
    for judgement in table.judgements:
        for cells in judgement_cells(judgement, label_html):
            yield {"cells": cells, "tone": tones.get(judgement.verdict, "")}
