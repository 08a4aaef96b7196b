"""Invariances of the loop: resume, micro-batch, moving average, skipped and diverged updates, corrupt state."""

import contextlib
import errno
import json
import logging
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.backbones.tiny import write_tiny_sd
from core.config import UserError, run_id
from core.training.checkpoint import Checkpoints
from core.training.loop import MAX_SKIPPED_IN_ROW, Diverged, lr_factor
from core.training.preemption import Preempted
from tests import worlds
from tests.training.golden import CURVES, curve

EMA = "train.ema_decay=0.9"


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    whole = worlds.trainer(tmp_path / "whole", [EMA])
    whole.train()
    with pytest.raises(Preempted, match="stopped at 12 images"):
        worlds.trainer(tmp_path / "cut", [EMA, "execution.stop_after_images=12"]).train()
    resumed = worlds.trainer(tmp_path / "cut", [EMA])
    assert resumed.clock.images == 12
    resumed.train()
    assert worlds.equal(worlds.parameters(whole), worlds.parameters(resumed))
    assert resumed.clock.evaluations == whole.clock.evaluations
    lines = [[line["images"] for line in run.run.metrics()] for run in (whole, resumed)]
    assert lines[0] == lines[1] == list(range(4, 33, 4))
    for a, b in zip(whole.run.metrics(), resumed.run.metrics(), strict=True):
        assert a["student/distill"] == b["student/distill"]


@pytest.mark.parametrize(("every", "drawn"), [(12, [12, 24, 32]), (16, [16, 32]), (100, [32])])
def test_a_sheet_is_drawn_at_its_multiples_and_at_the_end(tmp_path: Path, every: int, drawn: list[int]) -> None:
    trained, seen = worlds.trainer(tmp_path, [f"execution.sample_every_images={every}"]), []
    trained.sheet = seen.append
    trained.train()
    assert seen == drawn


def _train_in_child(folder: Path) -> None:
    worlds.trainer(folder, [EMA, "execution.checkpoint_every_images=8"]).train()


def test_sigkill_at_random_moments_changes_no_bit(tmp_path: Path) -> None:
    """Three attempts die wherever they are; the fourth ends with the weights of an uninterrupted run."""
    whole = worlds.trainer(tmp_path / "whole", [EMA])
    whole.train()
    folder, moments = tmp_path / "killed", random.Random(0)
    write_tiny_sd(folder / "tiny-sd")
    for images in (6, 14, 24):
        child = worlds.processes_of_their_own().Process(target=_train_in_child, args=(folder,))
        child.start()
        while child.is_alive() and not any(line["images"] >= images for line in _lines(folder)):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    last = worlds.trainer(folder, [EMA])
    assert 0 < last.clock.images < 32
    last.train()
    assert worlds.equal(worlds.parameters(whole), worlds.parameters(last))


def _lines(folder: Path) -> list[dict]:
    return [
        json.loads(line) for file in folder.glob("runs/*/*/*/metrics.jsonl") for line in file.read_text().splitlines()
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_another_micro_batch_gives_the_same_curve(tmp_path: Path, size: int) -> None:
    whole, split = (
        worlds.trainer(tmp_path / str(n), [EMA] if n == 4 else [EMA, f"execution.micro_batch={n}"]) for n in (4, size)
    )
    whole.train()
    split.train()
    for a, b in zip(whole.run.metrics(), split.run.metrics(), strict=True):
        assert a["student/distill"] == pytest.approx(b["student/distill"], rel=1e-4)
    # Adam divides rounding by rounding where a gradient is almost zero: 1% of the 8 updates of size lr = 1e-3.
    assert worlds.distance(worlds.parameters(whole), worlds.parameters(split)) < 8e-5
    assert whole.clock.evaluations == split.clock.evaluations


def test_a_micro_batch_that_does_not_divide_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="execution.micro_batch=3 does not divide batch_size=4"):
        worlds.trainer(tmp_path, ["execution.micro_batch=3"])


def test_the_average_moves_once_per_student_update_in_fp32(tmp_path: Path) -> None:
    trained = worlds.trainer(tmp_path, [EMA])
    name = next(n for n in trained.players["student"].parameters if "lora_B" in n)
    averages = trained.method.backbone.role_parameters("student_ema")
    average = averages[name].clone()
    for _ in range(3):
        trained._iteration()
        average.lerp_(trained.players["student"].parameters[name].detach(), 0.1)
    assert averages[name].dtype == torch.float32
    torch.testing.assert_close(averages[name].detach(), average.detach(), rtol=1e-6, atol=0)


def test_one_non_finite_batch_changes_nothing_and_many_diverge(tmp_path: Path) -> None:
    trained = worlds.trainer(tmp_path, [EMA])
    trained._iteration()
    healthy = worlds.parameters(trained)
    target = trained.method.losses

    def poisoned(*arguments):
        return {name: term * float("nan") for name, term in target(*arguments).items()}

    trained.method.losses = poisoned
    trained._iteration()
    assert worlds.equal(worlds.parameters(trained), healthy)
    with pytest.raises(Diverged, match="student: gradients not finite"):
        for _ in range(MAX_SKIPPED_IN_ROW):
            trained._iteration()
            trained._check_divergence({})
    trained.method.losses = target
    trained._iteration()
    assert trained.players["student"].skipped_in_row.item() == 0


def test_the_learning_rate_falls_over_the_last_part_of_the_budget(tmp_path: Path) -> None:
    factors = [lr_factor(x, 0.4) for x in (0.0, 0.59, 0.6, 0.7, 0.9, 1.0)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 1 - math.sqrt(0.75), 0]) and lr_factor(0.99, 0.0) == 1
    trained = worlds.trainer(tmp_path, ["train.budget.amount=32", "train.lr_decay=0.5"])
    trained.train()
    last = 1e-3 * (1 - math.sqrt((28 / 32 - 0.5) / 0.5))  # of eight updates
    assert [p.optimizer.param_groups[0]["lr"] for p in trained.players.values()] == pytest.approx([last, last])
    same, other = (worlds.config(tmp_path, f"train.lr_decay={value}") for value in (0.0, 0.5))
    assert run_id(same) == run_id(worlds.config(tmp_path)) != run_id(other), "older runs keep their ids"


def test_corrupt_state_falls_back_to_the_previous_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = Checkpoints(tmp_path, keep=3)
    for images in (4, 8, 12):
        states.save(images, {"a": torch.full((2,), float(images))}, {"clock": images})
    (tmp_path / "0000000012" / "COMPLETE").unlink()
    file = tmp_path / "0000000008" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "fewstep"):
        logging.getLogger("fewstep").propagate = True
        folder, meta = states.latest()
    tensors = load_file(folder / "tensors.safetensors")
    assert tensors["a"].tolist() == [4.0, 4.0] and meta == {"clock": 4}
    assert "0000000012 is corrupt (no completion marker)" in caplog.text
    assert "0000000008 is corrupt (hash mismatch)" in caplog.text
    assert (tmp_path / "corrupt-0000000008").is_dir()


def test_a_state_is_replaced_only_by_one_that_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = Checkpoints(tmp_path)
    states.save(4, {"a": torch.ones(2)}, {"clock": 1})

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="0000000004: No space left on device"):
        patch.setattr("core.training.checkpoint.save_file", full)
        states.save(4, {"a": torch.zeros(2)}, {"clock": 2})
    folder, meta = states.latest()
    assert load_file(folder / "tensors.safetensors")["a"].tolist() == [1, 1] and meta == {"clock": 1}
    states.save(4, {"a": torch.zeros(2)}, {"clock": 2})
    folder, meta = states.latest()
    assert load_file(folder / "tensors.safetensors")["a"].tolist() == [0, 0] and meta == {"clock": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["0000000004"]


def test_a_state_of_another_run_is_one_line(tmp_path: Path) -> None:
    """Of another sharing or method, which would fit in part or altogether."""
    stop = ["execution.stop_after_images=8", "execution.checkpoint_every_images=8"]
    ours = worlds.trainer(tmp_path / "ours", stop).run
    for name, options in (("full", {"sharing": "full"}), ("dmd2", {"experiment": "dmd2/tiny"})):
        other = worlds.trainer(tmp_path / name, stop, **options)
        with contextlib.suppress(Preempted):
            other.train()
        shutil.copytree(other.run.path / "state", ours.path / "state", dirs_exist_ok=True)
        with pytest.raises(UserError, match=f"0000000008 is a state of run {other.run.id}, not of {ours.id}: move"):
            worlds.trainer(tmp_path / "ours", stop)


def test_retention_keeps_the_newest_states(tmp_path: Path) -> None:
    states = Checkpoints(tmp_path, keep=2)
    for images in (4, 8, 12):
        states.save(images, {"a": torch.zeros(1)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000008", "0000000012"]


@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_snapshots_hold_the_students_own_weights_alone(tmp_path: Path, sharing: str) -> None:
    trained = worlds.trainer(tmp_path, [EMA], sharing)
    trained.train(until=0.25)
    trained.snapshot()
    folder = tmp_path / "runs" / "flash" / "tiny"
    (snapshot,) = folder.glob("*/snapshots/*")
    assert sorted(p.name for p in snapshot.iterdir()) == [
        "critic.safetensors", "student.safetensors", "student_ema.safetensors"
    ]  # fmt: skip
    weights = load_file(snapshot / "student.safetensors")
    assert weights.keys() == trained.players["student"].parameters.keys()
    assert all(".lora_" in name for name in weights) == (sharing == "lora")


@pytest.mark.parametrize("method", CURVES)
def test_golden_curve(tmp_path: Path, root: Path, method: str) -> None:
    """50 iterations of every loss term; regenerate with ``python -m tests.training.golden``, in a commit of its own."""
    expected = json.loads((root / "tests" / "golden" / f"{method}.json").read_text())
    measured = curve(method, tmp_path)
    assert measured.keys() == expected.keys()
    for name, values in expected.items():
        assert measured[name] == pytest.approx(values, rel=2e-3), name
