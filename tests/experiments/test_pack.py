"""Runs that are trained together on one base have the numbers that each has alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.config import ExperimentConfig, compose, resolve
from core.run import Run
from experiments.pack import train_pack
from experiments.train import DONE, train_config

QUIET = ["eval.metrics=[diversity]", "eval.splits=[train]", "eval.steps=[1]", "eval.prompts=a boat"]
FAST = [
    "execution.sample_every_images=1000",
    "train.ema_decay=0.5",
    "train.budget.amount=4",
    "train.budget.unit=iterations",
    "train.lr_decay=0.5",
    *QUIET,
]
CACHE = Path(tempfile.gettempdir()) / f"packed-{os.getpid()}"  # latents of all tests
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
CELLS = {"flash/tiny": FLASH, "dmd2/tiny": DMD2, "lcm/tiny": LCM}


def configs(where: str, experiment: str, cells: Sequence[Sequence[str]], *more: str) -> list[ExperimentConfig]:
    common = [*FAST, f"execution.runs_dir={where}", f"execution.cache_dir={CACHE}", *more]
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
        assert curve(one) == curve(other) and len(curve(one)) == 4
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
