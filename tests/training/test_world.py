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
from core.training.world import World

SETTINGS = [
    "train.budget.amount=32", "train.batch_size=8", "execution.log_every_images=8", "execution.num_threads=1",
    "execution.checkpoint_every_images=8", "method.student_lr=1e-3", "method.critic_lr=1e-3",
]  # fmt: skip


def start(folder: Path, processes: int, *overrides: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = ["-m", "experiments.train", "flash/tiny", *SETTINGS, f"execution.runs_dir={folder}/runs", *overrides]
    words = [*launcher, *command] if processes > 1 else [sys.executable, *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})


def trained(folder: Path, processes: int, *overrides: str) -> Run:
    done = start(folder, processes, *overrides)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "rror" in line)
    return Run.open(next(iter(find_runs(folder / "runs"))))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(next(run.path.glob("snapshots/*/student.safetensors")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("alone"), 1)


def test_two_processes_give_the_curve_of_one(alone: Run, tmp_path: Path) -> None:
    pair = trained(tmp_path, 2, "execution.use_solution_store=false")
    assert pair.id == alone.id
    ours, theirs = pair.metrics(), alone.metrics()
    assert [line["images"] for line in ours] == [8, 16, 24, 32] == [line["images"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        curves = [key for key in other if "/" in key]
        assert len(curves) >= 6
        np.testing.assert_allclose([one[k] for k in curves], [other[k] for k in curves], rtol=1e-4, atol=1e-6)
        assert one["evaluations"] | {"teacher": 0} == other["evaluations"] | {"teacher": 0}
        whole = [line["evaluations"].get("teacher", 0) + line["stored_evaluations"] for line in (one, other)]
        assert whole[0] == whole[1]
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(pair)[name], value, atol=1e-4, rtol=1e-3)
    assert pair.noted("processes") == 2 and len(list(pair.path.glob("attempts/*"))) == 1


def test_a_run_goes_on_with_another_number_of_processes(alone: Run, tmp_path: Path) -> None:
    assert start(tmp_path, 2, "execution.stop_after_images=16").returncode != 0  # torchrun makes 75 a failure
    stopped = Run.open(next(iter(find_runs(tmp_path / "runs"))))
    assert stopped.state() == "planned" and stopped.metrics()[-1]["images"] == 16
    resumed = trained(tmp_path, 1)
    assert resumed.state() == "done"
    assert resumed.metrics()[-1]["evaluations"]["student"] == alone.metrics()[-1]["evaluations"]["student"]
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(resumed)[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.batch_size=6"], "4 processes do not divide train.batch_size=6"),
        (["train.budget.unit=evaluations"], "train.budget.unit=evaluations needs one process"),
    ],
)
def test_what_several_processes_cannot_train_is_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        World.check(ALIKE, compose("flash/tiny", overrides))


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


ALIKE = World.__new__(World)
ALIKE.rank, ALIKE.size = 0, 4
