"""Records: small, without weights, and the same table comes out of them."""

from __future__ import annotations

import json
from pathlib import Path

from analysis.collect import cell_runs
from analysis.keep_records import MAX_LINES, MAX_SHEET_BYTES, save_records, thin
from analysis.render import render
from core.config import run_id
from core.run import Run


def test_thinning_keeps_both_ends_and_the_order() -> None:
    lines = [{"images": i} for i in range(1000)]
    kept = thin(lines)
    assert len(kept) == MAX_LINES and kept[0]["images"] == 0 and kept[-1]["images"] == 999
    assert [line["images"] for line in kept] == sorted({line["images"] for line in kept})
    assert thin(lines[:7]) == lines[:7]


def test_tables_rebuild_from_records_alone(full, sheet, tmp_path: Path) -> None:
    cells = full.cells()
    run = full.run(cells["full", 0])
    for images in range(1000):
        run.append_metrics({"attempt": 1, "images": images})
    (run.path / "snapshots").mkdir()
    (run.path / "snapshots" / "student.safetensors").write_bytes(b"weights")
    sheet(run, 16), sheet(run, 32)
    sheet(full.run(cells["full", 1]), 32)  # reports show each row's first seed
    before = render(full.table(), "md")

    saved = save_records(cell_runs(full.grid, "tiny", "full", [full.runs]), tmp_path / "records")
    assert len(saved) == 7
    record = tmp_path / "records" / cells["full", 0].id
    names = sorted(p.relative_to(record).as_posix() for p in record.rglob("*") if p.is_file())
    sheets = "samples/0000000032.webp"
    small = ["config.yaml", "evals.jsonl", "metrics.jsonl", "provenance.json"]
    assert names == ["attempts/0001.json", "attempts/0002.json", *small, sheets]
    assert (record / sheets).stat().st_size <= MAX_SHEET_BYTES
    assert str(tmp_path) not in (record / "config.yaml").read_text(), "no folder of this machine"
    assert Run.open(record).config.execution.runs_dir == "runs" and run_id(Run.open(record).config) == record.name
    assert [path.parts[-3] for path in record.parent.glob("*/samples/*")] == [record.name]
    lines = (record / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == MAX_LINES and json.loads(lines[-1])["images"] == 999

    full.runs = tmp_path / "records"
    assert render(full.table(), "md") == before


def test_unfinished_runs_are_not_kept(world, tmp_path: Path) -> None:
    world.run(world.cells()["plain", 0], "failed")
    assert save_records(cell_runs(world.grid, "tiny", "full", [world.runs]), tmp_path / "records") == []
