"""A grid on this machine, from the command line: its code is a snapshot, and every path is the user's.

The commands run in a git checkout of this project's code, in which a short stand-in takes the place of the training.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.run import Run, find_runs
from slurm.local import background_pid, cancel_background
from tests.ablations.test_run_local import JOB
from tests.slurm.waiting import wait

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("core", "experiments", "ablations", "analysis", "slurm")
MINE = "# @package _global_\ndefaults: [/experiment/flash/tiny, _self_]\ndata: {path: 'random:x'}\n"
GRID = """
title: T
base: {tiny: mine.yaml}
metrics: [kid]
layout: {nfe: [1], splits: [train]}
evaluate: {steps: [1]}
rows: [{id: first}, {id: second, set: {method.num_timesteps: 16}}]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    left_out = shutil.ignore_patterns("__pycache__", "assets", "records", "training")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, root / name, ignore=left_out)
    shutil.copytree(ROOT / "core/training", root / "core/training")
    (root / "experiments/train.py").write_text(JOB)
    (root / ".gitignore").write_text("__pycache__\n.cache\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", root, *words], check=True)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A user's folder with a grid and an experiment of their own; jobs wait while there is a file `hold`."""
    folder = tmp_path / "user"
    (folder / "grids").mkdir(parents=True)
    (folder / "grids/mine.yaml").write_text(MINE)
    (folder / "grids/g.yaml").write_text(GRID)
    (folder / "hold").touch()
    yield folder
    (folder / "hold").unlink(missing_ok=True)
    cancel_background(folder / "runs")


def start(folder: Path, checkout: Path, *words: str) -> subprocess.Popen:
    """``fewstep grid WORDS`` in the user's folder."""
    command = [sys.executable, "-m", "experiments.cli", "grid", *words, "--scale", "tiny"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def states(folder: Path) -> list[str]:
    return [Run.open(path).state() for path in find_runs(folder / "runs")]


def test_what_is_edited_while_a_grid_runs_changes_nothing_of_its_later_cells(folder: Path, checkout: Path) -> None:
    grid = start(folder, checkout, "run", "grids/g.yaml")
    wait(lambda: states(folder) == ["running"])
    (checkout / "experiments/train.py").write_text("import sys\nsys.exit('edited')\n")
    (checkout / "core/run.py").write_text("edited\n")
    (folder / "grids/mine.yaml").write_text(MINE + "seed: 9\ntrain: {batch_size: 8}\n")
    (folder / "hold").unlink()
    said, _ = grid.communicate(timeout=120)
    assert grid.returncode == 0 and "2 done" in said, said
    assert states(folder) == ["done", "done"] and {path.parent.name for path in find_runs(folder / "runs")} == {"mine"}
    assert len(list((folder / "runs/.slurm/code").iterdir())) == 1
    runs = [Run.open(path) for path in find_runs(folder / "runs")]
    assert {len(run.provenance()["commit"]) for run in runs} == {40}


def test_a_grid_in_the_background_takes_paths_from_where_it_was_started(folder: Path, checkout: Path) -> None:
    submitted = start(folder, checkout, "submit", "./grids/g.yaml", "--cluster", "local", "--runs-dir", "./runs")
    said, _ = submitted.communicate(timeout=120)
    assert submitted.returncode == 0 and f"pid {background_pid(folder / 'runs')}; log: " in said
    wait(lambda: states(folder) == ["running", "running"])
    (folder / "hold").unlink()
    wait(lambda: background_pid(folder / "runs") is None)
    assert states(folder) == ["done", "done"]
    assert not list((folder / "runs/.slurm/code").glob("*/.cache")), "what jobs remember is kept with the user's"
    shown, _ = start(folder, checkout, "logs", "grids/g.yaml").communicate(timeout=120)
    lines = shown.splitlines()
    assert lines[0].startswith("==> first-s0: ") and lines.count("at work") == 2
