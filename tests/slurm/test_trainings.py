"""Real trainings on a real SLURM of two nodes: what comes out is what one machine gives. ``make test-slurm``."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ablations.grid import Cell, load
from core.run import Run, find_runs
from slurm.local_cluster import Cluster
from slurm.profile import load as load_profile
from slurm.queue import Queue
from slurm.status import grid_status
from slurm.submit import Submitter
from tests.slurm.waiting import wait

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

CODE = Path(__file__).parents[2]

EMOJI = """
title: Six cells
base: {emoji: flash/emoji}
seeds: [0, 1]
axes: {lr: {method.student_lr: [3.0e-4, 1.0e-3, 3.0e-3]}}
budgets:
  full:
    set:
      train.budget.amount: 64
      train.precision: fp32
      data.num_variants: 1
      eval.num_images: 32
      eval.num_reference: 64
metrics: [kd_effnet, clip_score]
evaluate: {steps: [1, 4]}
layout: {nfe: [1, 4], splits: [train, heldout], best: [kd_effnet, clip_score]}
"""

TINY = """
title: One cell
base: {tiny: flash/tiny}
seeds: [0]
rows: [{id: one, label: One}]
budgets: {full: {set: {train.budget.amount: %d, train.batch_size: 8}}}
metrics: [kd_effnet]
"""


def fewstep(*words: object, env: dict[str, str]) -> str:
    """Output of the command; what it complains about is the test's failure."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *map(str, words)],
        capture_output=True, text=True, timeout=500, env=env, cwd=CODE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_grid_gives_the_table_that_one_machine_gives(use: Cluster, tmp_path: Path) -> None:
    (tmp_path / "six.yaml").write_text(EMOJI)
    common = [tmp_path / "six.yaml", "--set", f"execution.cache_dir={tmp_path}/cache", "--runs-dir"]
    env = use.environment | {"OMP_NUM_THREADS": "1"}
    here = fewstep("grid", "run", *common, tmp_path / "here", "--slots", "2", env=env)
    assert "6 done" in here
    said = fewstep("grid", "submit", *common, tmp_path / "there", "--cluster", "test", "--allow-dirty", env=env)
    assert "6 to run" in said and "train 6 cells in 6 tasks" in said and "evaluate 6 cells in 6 tasks" in said
    again = fewstep("grid", "submit", *common, tmp_path / "there", "--cluster", "test", "--allow-dirty", env=env)
    assert "to run" not in again and "job" not in again, "nothing is submitted twice"
    nodes: set[str] = set()
    cells = load(str(tmp_path / "six.yaml"), [f"execution.cache_dir={tmp_path}/cache"]).expand()

    def finished() -> bool:
        states = grid_status(cells, tmp_path / "there", Queue())
        nodes.update(state.node for state in states if state.node)
        assert not [state for state in states if state.state in ("failed", "lost", "cancelled")], states
        return all(state.state == "done" for state in states)

    wait(finished, 400)
    assert nodes == {"n1", "n2"}
    here, there = (fewstep("table", *common, tmp_path / name, "--format", "csv", env=env) for name in ("here", "there"))
    assert here == there
    rows = list(csv.DictReader(here.splitlines()))
    assert len(rows) == 3 * 2 * 2 * 2 and not any(row["missing"] for row in rows), "rows, metrics, splits, NFE"


@pytest.fixture
def submitter(use: Cluster, tmp_path: Path) -> Submitter:
    return Submitter("one", load_profile("test"), tmp_path / "there", CODE, print)


def tiny(folder: Path, images: int) -> Cell:
    (folder / "one.yaml").write_text(TINY % images)
    local = [f"execution.cache_dir={folder}/cache", "execution.sample_every_images=100000"]
    local += ["execution.checkpoint_every_images=80", "execution.log_every_images=16"]
    return load(str(folder / "one.yaml"), local).expand("tiny")[0]


def trained_here(cell: Cell, folder: Path) -> Run:
    """The same run, trained by one process outside the cluster."""
    words = [*cell.overrides, f"execution.runs_dir={folder}/here", "execution.num_threads=1"]
    fewstep("train", cell.experiment, *words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return Run.open(next(find_runs(folder / "here")))


def submit(submitter: Submitter, cell: Cell, **changes: int) -> str:
    """The training's job; the run is not measured."""
    works = submitter.missing([cell])[:1]
    (array,) = submitter.arrays(works, **{"cpus_per_process": 1, "mem_gb": 3, **changes})
    return submitter.submit(array).jobs[0]


def run_of(submitter: Submitter) -> Run | None:
    path = next(find_runs(submitter.runs_dir), None)
    return Run.open(path) if path else None


def is_done(submitter: Submitter) -> bool:
    run = run_of(submitter)
    return run is not None and run.state() == "done"


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(next(run.path.glob("snapshots/*/student.safetensors")))


def test_two_nodes_give_the_curve_of_one_process(submitter: Submitter, tmp_path: Path) -> None:
    cell = tiny(tmp_path, 64)
    alone = trained_here(cell, tmp_path)
    submit(submitter, cell, nodes=2)
    wait(lambda: is_done(submitter))
    pair = run_of(submitter)
    assert pair is not None and pair.noted("processes") == 2
    lines = list(zip(pair.metrics(), alone.metrics(), strict=True))
    assert [ours["images"] for ours, _ in lines][-1] == 64
    for ours, theirs in lines:
        losses = [key for key in theirs if key.startswith("student/") and "norm" not in key]
        assert "student/distill" in losses
        np.testing.assert_allclose([ours[key] for key in losses], [theirs[key] for key in losses], rtol=1e-5)


def test_a_preempted_training_ends_with_the_same_weights(use: Cluster, submitter: Submitter, tmp_path: Path) -> None:
    cell = tiny(tmp_path, 320)
    alone = trained_here(cell, tmp_path)
    submit(submitter, cell)

    def images() -> int:
        run = run_of(submitter)
        return max((line["images"] for line in run.metrics()), default=0) if run else 0

    wait(lambda: images() >= 48)
    (found,) = grid_status([cell], submitter.runs_dir, Queue())
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-w", found.node, "--exclusive", "-o", "/dev/null"]
    use.command([*urgent, "--wrap", "sleep 5"])
    wait(lambda: is_done(submitter))
    run = run_of(submitter)
    assert run is not None and run.noted("attempt") == 2, "one stop, one start"
    seen = [line["images"] for line in run.metrics()]
    assert seen == sorted(set(seen)) and seen == [line["images"] for line in alone.metrics()]
    ours, theirs = weights(run), weights(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
