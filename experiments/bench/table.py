"""The whole table, row after row in one run, on one core."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.config import UserError
from core.schema import nearest
from experiments.bench.contest import contest
from experiments.bench.duels import DUELS
from experiments.bench.machine import machine, pin_to_one_core
from experiments.bench.printed import lines_of
from experiments.bench.rows import ROWS, Row
from experiments.build import device_named


def chosen_rows(names: Sequence[str]) -> list[Row]:
    """The rows of these names, or all; UserError for one that does not exist."""
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: unknown row{nearest(name, known)}; all: {', '.join(known)}")
    return [known[name] for name in names] or list(ROWS)


def measure_table(names: Sequence[str], repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Machine and rows as the committed file holds them; ``tell`` gets the lines of a row as soon as it is measured."""
    rows, device = chosen_rows(names), device_named("auto")
    if device.type == "cpu":
        pin_to_one_core()
    found: dict[str, Any] = {"machine": machine(device), "repeats": repeats, "rows": []}
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            measured = contest(DUELS[row.name](Path(folder)), repeats)
        found["rows"].append(asdict(row) | measured)
        for line in lines_of(found["rows"][-1]):
            tell(line)
    return found
