"""The speed of the project for its result page, from the committed table of ``fewstep bench``. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.collect import RECORDS
from analysis.render import fold
from experiments.bench.printed import (
    block_details,
    evaluations,
    on_gpu,
    parts,
    row_of,
    value_of,
    wanted,
    with_spread,
)
from experiments.bench.rows import BLOCKS, RATIO, ROWS, SPEED, Row

FILE = RECORDS.parent / "bench.json"
NOT_YET = "*not measured yet*"


def speed(file: Path = FILE) -> str:
    """Machine and table of a CPU, then those of a GPU; what has not been measured says so."""
    tables = json.loads(file.read_text()) if file.is_file() else {}
    return "\n\n".join([_section("On one core of a CPU", tables.get("cpu")), _section("On a GPU", tables.get("cuda"))])


def _section(title: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"**{title}:** {NOT_YET}."
    measured = {row["name"]: row for row in found["rows"]}
    known = (*ROWS, *BLOCKS) if found["machine"]["device"] != "cpu" else ROWS
    table = ["| work | measured | wanted | efficiency |", "| --- | ---: | ---: | ---: |"]
    table += [_line(row, measured.get(row.name)) for row in known]
    behind = ["| work | ours | reference | where the time goes |", "| --- | --- | --- | --- |"]
    behind += [_behind(measured[row.name]) for row in known if row.name in measured]
    work = fold("Work of both sides, and where the time goes", "\n".join(behind))
    return "\n\n".join([f"**{title}:** {machine_line(found)}", "\n".join(table), work])


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine, the versions and the day of a table, in one sentence."""
    machine = found["machine"]
    units = ", ".join(machine["units_for_16_bits"]) or "none"
    if machine["widened_products"]:
        units += " (in bf16 both sides multiply rounded operands in fp32)"
    device = machine["cpu"] if machine["device"] == "cpu" else f"{machine['device']} beside {machine['cpu']}"
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "diffusers", "peft"))
    return (
        f"{device}, {machine['cores']} cores, units for 16-bit numbers: {units}; {packages}, Python "
        f"{machine['python']}; commit {str(machine['commit'])[:10]}, {machine['measured']}. Medians of "
        f"{found['repeats']} repeats in turn (lowest-highest)."
    )


def _line(row: Row, found: Mapping[str, Any] | None) -> str:
    """A row of the table; bold where it is as wanted."""
    if found is None:
        return f"| {row.work} | {NOT_YET} | {wanted(row)} | |"
    row = row_of(found)
    if row.kind == SPEED:
        return f"| {row.work} | see below | | |"
    value = value_of(found)
    shown = with_spread(value, "" if row.kind == RATIO else " s")
    shown = f"**{shown}**" if row.reached(value["median"]) else f"{shown}, not reached"
    efficiency = with_spread(found["efficiency"]) if "efficiency" in found else ""
    return f"| {row.work} | {shown} | {wanted(row)} | {efficiency} |"


def _behind(found: Mapping[str, Any]) -> str:
    """Evaluations of both sides, what a GPU adds, and where the time goes."""
    row = row_of(found)
    if row.kind == SPEED:
        return f"| {row.work} | {'<br>'.join(block_details(found))} | | |"
    ours, reference = (evaluations(found[side]) if side in found else "" for side in ("ours", "reference"))
    ours = "<br>".join(filter(None, [ours, on_gpu(found)]))
    return f"| {row.work} | {ours} | {reference} | {parts(found['time']) if 'time' in found else ''} |"
