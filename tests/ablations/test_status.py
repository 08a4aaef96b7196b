"""The states of a grid's cells from run folders: right after whatever happened to one, and cheap for a thousand."""

import cProfile
import json
import pstats
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ablations.grid import Cell, load
from ablations.status import statuses
from core.config import to_yaml
from core.run import KILLED

RUNS = Path("runs")
RECORD = Path(__file__).resolve().parents[2] / "analysis" / "records" / "runs" / "157e67d615"
GRID = """
title: T
base: {emoji: flash/emoji}
seeds: [%s]
rows: [{id: a}]
metrics: [kd_effnet]
evaluate: {steps: [1, 2, 4]}
"""


def cells_with_runs(tmp_path: Path, count: int) -> list[Cell]:
    """Cells of a grid whose run folders hold what a finished run has left; only ids differ."""
    (tmp_path / "g.yaml").write_text(GRID % ", ".join(map(str, range(count))))
    cells = load(str(tmp_path / "g.yaml")).expand("emoji")
    config = to_yaml(cells[0].config)
    for cell in cells:
        folder = RUNS / "flash" / "emoji" / f"{cell.name}-{cell.id}"
        shutil.copytree(RECORD, folder)
        (folder / "config.yaml").write_text(config)
    return cells


def calls(work: Callable[[], Any]) -> int:
    """The number of calls of functions, which does not depend on the machine as seconds do."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return pstats.Stats(profile).total_calls


def test_a_further_cell_and_its_status_cost_little(tmp_path: Path) -> None:
    """It took 1,334 calls to expand a cell and 910 for its status when ``grid status`` of 1,000 runs took 2 s."""
    cells = cells_with_runs(tmp_path, 24)
    grid, few = load(str(tmp_path / "g.yaml")), load(str(tmp_path / "g.yaml"), ["eval.batch_size=50"])
    object.__setattr__(few, "seeds", grid.seeds[:4])
    few.expand("emoji")
    assert (calls(lambda: grid.expand("emoji")) - calls(lambda: few.expand("emoji"))) / 20 < 250
    statuses(cells, RUNS)
    assert (calls(lambda: statuses(cells, RUNS)) - calls(lambda: statuses(cells[:4], RUNS))) / 20 < 200


def test_a_status_follows_the_folder(tmp_path: Path) -> None:
    """Numbers taken away by hand, a torn line, an attempt that was killed, a folder that was moved."""
    cells = cells_with_runs(tmp_path, 5)
    lacking, torn, killed, moved, _ = (item.path for item in statuses(cells, RUNS))
    lines = (lacking / "evals.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["metric"] != "kd_effnet"]
    (lacking / "evals.jsonl").write_text("".join(kept))
    with (torn / "evals.jsonl").open("a") as file:
        file.write(lines[0][:50])
    (killed / "attempts" / "0002.json").write_text('{"attempt": 2, "started": "now"}')
    shutil.move(moved, RUNS / "elsewhere" / moved.name)
    found = statuses(cells, RUNS)
    assert [item.state for item in found] == ["trained", "done", "failed", "done", "done"]
    assert found[0].reason == "6 numbers to measure, first: kd_effnet train 1 steps"
    assert found[2].reason == KILLED and found[3].path == RUNS / "elsewhere" / moved.name


@pytest.mark.parametrize("setting", ["eval.num_images: 500", "eval.sampler: ddim", "eval.guidance: 2.0"])
def test_numbers_of_other_pictures_do_not_count(tmp_path: Path, setting: str) -> None:
    """The same folders, asked for other numbers of images and then another sampler."""
    cells_with_runs(tmp_path, 1)
    text = (GRID % "0").replace("{id: a}", f"{{id: a, set: {{{setting}}}}}")
    (tmp_path / "g.yaml").write_text(text)
    (item,) = statuses(load(str(tmp_path / "g.yaml")).expand("emoji"), RUNS)
    assert item.state == "trained"
