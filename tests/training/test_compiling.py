"""``execution.compile=auto`` compiles where that pays, by what this machine has measured."""

import json
import logging
from pathlib import Path

import pytest
import torch

from core.config import compose
from core.training import compiling
from core.training.compiling import Compiler, Measured, graphs
from tests import worlds

PERIOD = 5  # of dmd2/tiny here


class Noting:
    """Notes what it is told to compile by."""

    def __init__(self) -> None:
        self.backends: list[str | None] = []

    def compile_blocks(self, backend: str | None) -> None:
        self.backends.append(backend)


class Doubling(torch.nn.Module):
    """A block of our own: torch's modules alone are never traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def compiler(folder: Path, wanted: str = "auto") -> tuple[Compiler, Noting]:
    settings = [f"execution.compile={wanted}", f"execution.cache_dir={folder}", f"method.ttur={PERIOD}"]
    backbone = Noting()
    return Compiler(compose("dmd2/tiny", settings), backbone), backbone


def run(one: Compiler, seconds: list[float], of: int) -> None:
    """Iterations of whole periods that take ``seconds`` each; ``of``: periods of the whole training."""
    for number, each in enumerate(seconds):
        for iteration in range(PERIOD):
            one.after(each / PERIOD, (number * PERIOD + iteration + 1) / (of * PERIOD))


@pytest.mark.parametrize(("of", "compiles"), [(35, False), (40, True)])
def test_where_nothing_is_known_an_hour_must_be_left(tmp_path: Path, of: int, compiles: bool) -> None:
    one, backbone = compiler(tmp_path)
    run(one, [100.0, 100.0], of)  # 3300 or 3800 s are left
    assert backbone.backends == (["inductor"] if compiles else [])


def test_what_was_measured_decides_for_the_next_training(tmp_path: Path) -> None:
    one, backbone = compiler(tmp_path)
    run(one, [100.0, 100.0, 260.0, 60.0], of=100)
    assert backbone.backends == ["inductor"]
    (note,) = (tmp_path / "inductor").glob("*.json")
    assert json.loads(note.read_text()) == {"compile_s": pytest.approx(200.0), "ratio": pytest.approx(0.6)}
    for of, compiles in ((8, True), (6, False)):  # 600 or 400 s are left, of which 240 or 160 would be saved
        one, backbone = compiler(tmp_path)
        run(one, [100.0, 100.0], of)
        assert bool(backbone.backends) == compiles


def test_saving_must_exceed_what_compiling_takes() -> None:
    assert Measured(200.0, 0.6).pays(501.0) and not Measured(200.0, 0.6).pays(499.0)
    assert not Measured(0.0, 1.1).pays(1e9)


def test_blocks_run_plain_again_where_nothing_is_saved(tmp_path: Path) -> None:
    one, backbone = compiler(tmp_path)
    run(one, [100.0, 100.0, 260.0, 101.0], of=100)
    assert backbone.backends == ["inductor", None]


def test_a_backend_that_is_named_compiles_at_once(tmp_path: Path) -> None:
    assert compiler(tmp_path, "aot_eager")[1].backends == ["aot_eager"]
    assert compiler(tmp_path, "off")[1].backends == []


@pytest.mark.slow
def test_a_training_that_was_compiled_on_the_way_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "TRIED_FROM_S", 0.0)
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setattr(logging.getLogger("fewstep"), "propagate", True)
    before, curves = graphs(), []
    for wanted in ("off", "auto"):
        settings = ["train.budget.amount=24", f"execution.compile={wanted}", f"execution.cache_dir={tmp_path}/cache"]
        trained = worlds.trainer(tmp_path / wanted, settings)
        with caplog.at_level(logging.INFO, "fewstep"):
            trained.train()
        curves.append([line["student/distill"] for line in trained.run.metrics()])
        assert (graphs() > before) == (wanted == "auto")
    assert len(curves[0]) == 6 and curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert "compiled in" in caplog.text


def test_graphs_that_come_late_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("fewstep"), "propagate", True)
    one, _ = compiler(tmp_path, "aot_eager")
    block = Doubling()
    block.compile(backend="aot_eager")
    with caplog.at_level(logging.WARNING, "fewstep"):
        block(torch.ones(1, 2))
        run(one, [1.0, 1.0, 1.0], of=10)
        assert "more graphs" not in caplog.text
        block(torch.ones(3, 2))
        run(one, [1.0], of=10)
        assert "compiled 1 more graphs" in caplog.text
        run(one, [1.0], of=10)
    assert caplog.text.count("more graphs") == 1
