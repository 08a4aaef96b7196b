"""Two processes train as one: same draws, same curves, same counts; and a run may change their number on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.config import UserError, compose
from core.run import Run, find_runs
from core.training.loop import micro_batch
from core.training.world import World, check_processes
from experiments.cli import main

SETTINGS = [
    "train.budget.amount=32", "train.batch_size=8", "execution.log_every_images=8", "execution.num_threads=1",
    "execution.checkpoint_every_images=8", "method.student_lr=1e-3", "method.critic_lr=1e-3",
]  # fmt: skip


def words(folder: Path, *overrides: str) -> list[str]:
    return ["flash/tiny", *SETTINGS, f"execution.runs_dir={folder}/runs", *overrides]


def run_in(folder: Path) -> Run:
    return Run.open(next(iter(find_runs(folder / "runs"))))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(next(run.path.glob("snapshots/*/student.safetensors")))


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_and_one_goes_on_with_it(tmp_path: Path) -> None:
    """Started by torchrun with two processes, stopped at half of the budget, ended by one: the curve of one alone."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    pair = [*launch, "-m", "experiments.train", *words(tmp_path / "pair", "execution.use_solution_store=false")]
    stopped = subprocess.run(
        [*pair, "execution.stop_after_images=16"],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    ours = run_in(tmp_path / "pair")
    assert stopped.returncode != 0, "torchrun makes 75 a failure"
    assert ours.state() == "planned" and ours.metrics()[-1]["images"] == 16, stopped.stderr[-3000:]
    assert ours.noted("processes") == 2 and len(list(ours.path.glob("attempts/*"))) == 1
    assert main(["train", *words(tmp_path / "pair", "execution.use_solution_store=false")]) == 0
    assert main(["train", *words(tmp_path / "alone")]) == 0
    alone = run_in(tmp_path / "alone")
    assert ours.id == alone.id and ours.state() == "done"
    assert (
        [line["images"] for line in ours.metrics()] == [8, 16, 24, 32] == [line["images"] for line in alone.metrics()]
    )
    for one, other in zip(ours.metrics(), alone.metrics(), strict=True):
        curves = [key for key in other if "/" in key]
        assert len(curves) >= 6
        np.testing.assert_allclose([one[k] for k in curves], [other[k] for k in curves], rtol=1e-4, atol=1e-6)
        assert one["evaluations"] | {"teacher": 0} == other["evaluations"] | {"teacher": 0}
        whole = [line["evaluations"].get("teacher", 0) + line["stored_evaluations"] for line in (one, other)]
        assert whole[0] == whole[1]
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(ours)[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.batch_size=6"], "4 processes do not divide train.batch_size=6"),
        (["train.budget.unit=evaluations"], "train.budget.unit=evaluations needs one process"),
    ],
)
def test_what_several_processes_cannot_train_is_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_processes(compose("flash/tiny", overrides), 4)


def test_a_micro_batch_divides_the_share_of_a_process() -> None:
    config = compose("flash/tiny", ["train.batch_size=8", "execution.micro_batch=4"])
    assert micro_batch(config, 2) == 4
    with pytest.raises(UserError, match="execution.micro_batch=4 does not divide train.batch_size=8 / 4 processes"):
        micro_batch(config, 4)


def test_a_launcher_that_says_half_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="without RANK"):
        World.join(torch.device("cpu"))


def test_shares_are_the_whole() -> None:
    shares = []
    for rank in range(4):
        world = World.__new__(World)
        world.rank, world.size = rank, 4
        shares.append(world.share(np.arange(16, 32)))
    assert np.concatenate(shares).tolist() == list(range(16, 32))
