"""Committed records: the small files of a grid's runs; tables and figures rebuild from them without training.

``analysis/records/runs/<run id>/``, one for all grids that have the run: config.yaml, provenance.json, attempts/,
evals.jsonl, metrics.jsonl thinned to MAX_LINES, and of a row's first seed, which reports show, one sample sheet of at
most MAX_SHEET_BYTES. No weights.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ablations.status import FINAL
from analysis.collect import CellRun
from core.run import Run, atomic_folder
from core.schema import ExecutionConfig
from core.typed import dump_yaml, load_yaml
from experiments.sheet import newest_sheet

MAX_LINES = 200
MAX_SHEET_BYTES = 36_000


def save_records(items: Sequence[CellRun], folder: Path) -> list[Path]:
    """Copy the finished runs of ``items`` to ``folder/<run id>/``, replacing older ones; returns them."""
    out, shown = [], set()
    for item in items:
        if item.first is None or item.state not in FINAL:
            continue
        with atomic_folder(folder / item.cell.id) as target:
            _copy(item.first.run, target)
            if item.cell.row not in shown:
                _copy_sheet(item.first.run, target)
        shown.add(item.cell.row)
        out.append(folder / item.cell.id)
    return out


def _copy(run: Run, target: Path) -> None:
    (target / "config.yaml").write_text(_without_places((run.path / "config.yaml").read_text()))
    for name in ("provenance.json", "evals.jsonl"):
        if (run.path / name).exists():  # a diverged run may never have been evaluated
            shutil.copyfile(run.path / name, target / name)
    if (run.path / "attempts").exists():
        shutil.copytree(run.path / "attempts", target / "attempts")
    lines = (json.dumps(line, separators=(",", ":")) for line in thin(run.metrics()))
    (target / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _without_places(text: str) -> str:
    """A stored configuration without the folders of the machine that it ran on; they are no part of its identity."""
    values = load_yaml(text, "a configuration")
    usual = vars(ExecutionConfig())
    places = [
        name for name, value in values["execution"].items() if name.endswith("_dir") and Path(value or "").is_absolute()
    ]
    if not places:
        return text
    values["execution"] |= {name: usual[name] for name in places}
    return dump_yaml(values)


def _copy_sheet(run: Run, target: Path) -> None:
    sheet = newest_sheet(run.path)
    if sheet is not None:
        (target / "samples").mkdir()
        (target / "samples" / f"{sheet.stem}.webp").write_bytes(small_webp(sheet, MAX_SHEET_BYTES))


def thin(lines: list[dict[str, Any]], most: int = MAX_LINES) -> list[dict[str, Any]]:
    """At most ``most`` lines, evenly spaced, the first and the last (which holds the totals) among them."""
    if len(lines) <= most:
        return lines
    return [lines[round(i * (len(lines) - 1) / (most - 1))] for i in range(most)]


def small_webp(path: Path, most_bytes: int) -> bytes:
    """The sheet as a WebP, shrunk until it has at most ``most_bytes``; one that is small enough as it is."""
    if path.suffix == ".webp" and path.stat().st_size <= most_bytes:
        return path.read_bytes()
    image = Image.open(path).convert("RGB")
    while True:
        out = io.BytesIO()
        image.save(out, "webp", quality=80, method=6)
        if out.tell() <= most_bytes or min(image.size) < 32:
            return out.getvalue()
        scale = max(0.5, min(0.95, (most_bytes / out.tell()) ** 0.5))
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)
