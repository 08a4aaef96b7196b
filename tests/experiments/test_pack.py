"""Runs that are trained together on one base have the numbers that each has alone."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.config import ExperimentConfig, UserError, compose, resolve
from core.data.memory import Memory
from core.run import Run
from experiments.attempts import HEADING
from experiments.pack import Pack, main, train_pack
from experiments.packing import Entry, write_pack
from experiments.train import DONE, FAILED, PREEMPTED, train_config

QUIET = ["eval.metrics=[diversity]", "eval.splits=[train]", "eval.steps=[1]", "eval.prompts=a boat"]
FAST = [
    "execution.sample_every_images=1000",
    "train.ema_decay=0.5",
    "train.budget.amount=4",
    "train.budget.unit=iterations",
    "train.lr_decay=0.5",
    *QUIET,
]
NO_STORE = "execution.use_solution_store=false"
FLASH = [
    ["method.adversarial_weight=[.1,.1,.2,.3]", "method.dmd_weight=[.1,.3,.5,.7]", "method.adversarial_loss=hinge"],
    ["method.student_lr=1e-3", "backbone.lora_rank=8"],
    ["method.adversarial_weight=[0,0,0,0]", "method.distill_loss=l1"],
]
DMD2 = [
    ["method.ttur=2", "method.regression_weight=.5", "method.regression_steps=4"],
    ["method.ttur=1", "method.gan=off", "method.regression_weight=.25", "method.regression_steps=4"],
]
LCM = [["method.student_lr=1e-3"], ["method.distance=mse", "method.target_decay=0.5"]]
PLACES: dict[str, Path] = {}
CELLS = {"flash/tiny": FLASH, "dmd2/tiny": DMD2, "lcm/tiny": LCM}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Latents are computed once for all tests."""
    PLACES["cache"] = tmp_path_factory.mktemp("cache")


def configs(where: str, experiment: str, cells: Sequence[Sequence[str]], *more: str) -> list[ExperimentConfig]:
    common = [*FAST, f"execution.runs_dir={where}", f"execution.cache_dir={PLACES['cache']}", *more]
    return [resolve(compose(experiment, [*common, *cell])) for cell in cells]


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Everything that the last snapshot holds, by role and name."""
    (newest,) = [*sorted((run.path / "snapshots").iterdir())][-1:]
    found = {}
    for file in newest.glob("*.safetensors"):
        found |= {f"{file.stem}/{name}": value for name, value in load_file(file).items()}
    return found


def curve(run: Run) -> list[dict[str, float]]:
    """Losses and norms of each line of the log, the position with them."""
    skipped = (
        "attempt",
        "seconds",
        "images_per_s",
        "device_hours",
        "evaluations",
        "stored_evaluations",
        "ahead_evaluations",
    )
    return [{name: value for name, value in line.items() if name not in skipped} for line in run.metrics()]


def asked(run: Run) -> int:
    """Network evaluations that the method asked for, wherever they were computed."""
    last = run.metrics()[-1]
    return sum(last["evaluations"].values()) + last["stored_evaluations"]


def assert_alike(alone: Sequence[ExperimentConfig], packed: Sequence[ExperimentConfig]) -> None:
    for first, second in zip(alone, packed, strict=True):
        one, other = Run.create(first), Run.create(second)
        assert one.id == other.id and one.path != other.path and other.state() == "done"
        assert curve(one) == curve(other) and len(curve(one)) == first.train.budget.amount
        a, b = weights(one), weights(other)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert asked(one) == asked(other)
        values = [[(line["metric"], line["value"]) for line in run.evals()] for run in (one, other)]
        assert values[0] == values[1]


@pytest.mark.parametrize(
    ("experiment", "sharing"),
    [("flash/tiny", "lora"), ("flash/tiny", "full"), ("dmd2/tiny", "lora"), ("lcm/tiny", "lora")],
)
def test_each_run_of_a_pack_has_the_numbers_that_it_has_alone(experiment: str, sharing: str) -> None:
    """Bit by bit on a CPU, whichever of them has solved the teacher for all."""
    settings = (experiment, CELLS[experiment], NO_STORE, f"backbone.sharing={sharing}")
    alone, packed = configs("alone", *settings), configs("packed", *settings)
    assert [train_config(config, evaluate=True) for config in alone] == [DONE] * len(alone)
    assert train_pack(packed, evaluate=True) == DONE
    assert_alike(alone, packed)


def test_a_signal_lets_all_save_and_they_go_on_from_different_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("flash/tiny", FLASH[:2], NO_STORE)
    alone, packed = configs("alone", *settings), configs("packed", *settings)
    assert [train_config(config) for config in alone] == [DONE, DONE]
    steps, following = [], Pack._next

    def interrupted(pack: Pack) -> None:
        steps.append([member.images for member in pack.active])
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGUSR2)
        following(pack)

    with monkeypatch.context() as patch:
        patch.setattr(Pack, "_next", interrupted)
        assert train_pack(packed) == PREEMPTED
    assert steps == [[0, 0], [4, 0], [4, 4], [4, 8]], "each time another one is first"
    runs = [Run.create(config) for config in packed]
    assert [run.noted("state") for run in runs] == ["stopped", "stopped"]
    assert [sorted(folder.name for folder in (run.path / "state").iterdir()) for run in runs] == [
        ["0000000004"],
        ["0000000008"],
    ]
    words = [
        [*FAST, f"execution.cache_dir={PLACES['cache']}", "execution.runs_dir=packed", NO_STORE, *cell]
        for cell in FLASH[:2]
    ]
    file = write_pack(Path("packs"), [Entry("flash/tiny", tuple(own), f"{i}.log") for i, own in enumerate(words)])
    assert main([str(file)]) == DONE
    assert_alike(alone, packed)
    for number, run in enumerate(runs):
        first, _, told = Path(f"{number}.log").read_text().partition("\n")
        assert HEADING.match(first) and told in (run.path / "log.txt").read_text() and run.id in told
        assert runs[1 - number].id not in told, "lines go to the log of their own run"
    assert main([str(file)]) == DONE and all(run.noted("attempt") == 2 for run in runs)


def test_one_that_diverges_or_is_trained_elsewhere_leaves_the_others_alone() -> None:
    short = ["train.budget.amount=24", "train.batch_size=1", "execution.log_every_images=1"]
    cells = [FLASH[2], ["method.student_lr=1e38"], ["method.student_lr=1e-3"]]
    (alone,) = configs("alone", "flash/tiny", cells[:1], NO_STORE, *short)
    packed = configs("packed", "flash/tiny", cells, NO_STORE, *short)
    assert train_config(alone) == DONE
    good, bad, taken = map(Run.create, packed)
    with taken.lock():
        assert train_pack(packed) == DONE
    assert bad.state() == "diverged" and "student: gradients not finite" in bad.reason()
    assert "diverged" in (bad.path / "log.txt").read_text()
    assert not taken.attempts() and "is being trained by pid" in (taken.path / "log.txt").read_text()
    assert good.noted("packed_with") == [bad.id, taken.id]
    assert_alike([alone], packed[:1])
    assert train_pack(packed[1:2]) == FAILED and len(bad.attempts()) == 1, "a diverged run is a result"


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ("train.precision=bf16", "train.precision is fp32 and bf16 in one pack; runs that share a base agree in it"),
        ("backbone.sharing=full", "backbone.sharing is lora and full in one pack; runs that share a base agree in it"),
        ("execution.sharding=fsdp", "execution.sharding=fsdp: a pack trains in one process; allowed: none"),
    ],
)
def test_what_cannot_share_a_base_is_told_at_once(other: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = configs("runs", "flash/tiny", [[], [other]])
    with pytest.raises(UserError, match=re.escape(line)):
        train_pack([first, second])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2: a pack of runs trains in one process; allowed: 1"):
        train_pack([first])
    assert not Path("runs").exists()


def test_a_memory_keeps_what_somebody_still_needs() -> None:
    memory, solved = Memory(), []

    def solve(first: int) -> torch.Tensor:
        solved.append(first)
        return torch.arange(first, first + 4)[:, None] * 10

    rows = memory.rows("solutions", 1)
    found, kept = rows.fetch(np.arange(4, 8), lambda: solve(4))
    again, kept_now = memory.rows("solutions", 1).fetch(np.arange(5, 7), lambda: solve(0))
    assert not kept and kept_now and solved == [4] and again.tolist() == [[50], [60]] and len(found) == 4
    assert not memory.rows("solutions", 2).has(np.arange(4, 5))
    memory.forget(7)
    assert rows.has(np.array([7])) and not rows.has(np.array([6])) and len(memory) == 1
