"""Logs of cells: the newest attempt is shown, however the cell was run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ablations.grid import Cell, load
from ablations.job import start
from ablations.logs import last_lines, log_of, newest_attempt
from ablations.work import EVALUATE, TRAIN, Work
from core.run import Run
from experiments.cli import main

GRID = """
title: T
base: {tiny: flash/tiny}
metrics: [kd_effnet]
rows: [{id: one}, {id: other, set: {method.num_timesteps: 16}}]
"""


@pytest.fixture
def cell() -> Cell:
    Path("g.yaml").write_text(GRID)
    return load("g.yaml").expand("tiny")[0]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["grid", "logs", "g.yaml", *words, "--scale", "tiny"]) == 0
    return capsys.readouterr().out


def attempt(cell: Cell, kind: str, text: str) -> None:
    """What a job leaves behind that says ``text``."""
    log = log_of(Path("runs"), Work(kind, cell).key)
    assert start(log, [sys.executable, "-c", f"print({text!r})"], {}).wait() == 0


def test_the_end_of_a_log_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\n\ntwo\nerror: three\n")
    assert last_lines(tmp_path / "log", 2) == "two | error: three"
    assert last_lines(tmp_path / "none") == ""


def test_the_newest_attempt_of_each_log_is_shown(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("first", "---\nsecond"):
        attempt(cell, TRAIN, text)
    attempt(cell, EVALUATE, "third")
    said = shown(capsys, "one-s0")
    assert "first" not in said and "second" in said and said.index("second") < said.index("third")
    assert shown(capsys, cell.id, "--lines", "1").splitlines()[1::2] == ["second", "third"]
    log = log_of(Path("runs"), cell.id)
    assert newest_attempt(log)[0].startswith("--- 2") and newest_attempt(log)[1:] == ["---", "second"]
    assert last_lines(log) == "--- | second"


def test_a_cell_without_a_log_says_so_in_one_line(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "one-s0") == f"one-s0 {cell.id}: no log, no job of this cell has started\n"
    attempt(cell, TRAIN, "at work")
    first, heading, text, other = shown(capsys).splitlines()
    assert first.startswith("==> one-s0: ") and heading.startswith("--- ") and text == "at work"
    assert other.startswith("other-s0 ") and other.endswith(": no log, no job of this cell has started")


def test_a_run_that_no_grid_has_trained_shows_its_own(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    (Run.create(cell.config).path / "log.txt").write_text("trained by hand\n")
    assert shown(capsys, "one-s0").splitlines()[1:] == ["trained by hand"]


def test_a_cell_that_is_not_there_is_one_line(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (["onee-s0"], "unknown cell 'onee-s0'; nearest: one-s0"),
        (["--lines", "0"], "--lines=0 is out"),
    ):
        assert main(["grid", "logs", "g.yaml", *words, "--scale", "tiny"]) == 2
        said = capsys.readouterr().err
        assert text in said and said.count("\n") == 1
