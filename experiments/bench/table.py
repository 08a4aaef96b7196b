"""The whole table, row after row in one run; on a CPU on one core."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from core.config import UserError
from core.schema import check_range, nearest
from experiments.bench.blocks import measure_blocks
from experiments.bench.contest import contest
from experiments.bench.duels import DUELS
from experiments.bench.gpu import beside_on_gpu
from experiments.bench.machine import machine, pin_to_one_core
from experiments.bench.printed import lines_of
from experiments.bench.processes import COMMANDS, Places, time_command
from experiments.bench.profile import time_by_package
from experiments.bench.rows import BLOCKS, ROWS, SECONDS, Row
from experiments.build import device_named

Tell = Callable[[str], None]


def chosen_rows(names: Sequence[str], device: torch.device) -> list[Row]:
    """The rows of these names, or all that ``device`` can have; UserError for one that does not exist."""
    known = {row.name: row for row in (*ROWS, *(BLOCKS if device.type == "cuda" else ()))}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such row{nearest(name, known)}; allowed here: {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def measure_table(names: Sequence[str], repeats: int, tell: Tell) -> dict[str, Any]:
    """Machine and rows as the committed file holds them; ``tell`` gets the lines of a row once it is measured."""
    check_range("--repeats", repeats, 1)
    device = device_named("auto")
    rows = chosen_rows(names, device)
    if device.type == "cpu":
        pin_to_one_core()
    found: dict[str, Any] = {"machine": machine(device), "repeats": repeats, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder))
        for row in rows:
            found["rows"].append(asdict(row) | measure_row(row, places, repeats, device))
            for line in lines_of(found["rows"][-1]):
                tell(line)
    return found


def measure_row(row: Row, places: Places, repeats: int, device: torch.device) -> dict[str, Any]:
    """Measure one row."""
    if row in BLOCKS:
        return measure_blocks(row.name, repeats, device)
    if row.kind == SECONDS:
        return _measure_command(row, places, repeats)
    duel = DUELS[row.name](places.fresh())
    found = contest(duel, repeats)
    return found | beside_on_gpu(duel, found)


def _measure_command(row: Row, places: Places, repeats: int) -> dict[str, Any]:
    """Seconds of a command, and where they go if they are too many."""
    found = time_command(row.name, places, repeats)
    if row.reached(found["seconds"]["median"]):
        return found
    return found | {"time": time_by_package(COMMANDS[row.name](places))}


def keep(found: dict[str, Any], file: Path) -> None:
    """Write a table to ``file``, which holds the last one of each kind of device."""
    kind = "cpu" if found["machine"]["device"] == "cpu" else "cuda"
    older = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(older | {kind: found}, indent=1) + "\n")
