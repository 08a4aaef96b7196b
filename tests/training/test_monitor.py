"""A training tells how it goes: a bar that keeps its line on a terminal, lines with the time that is left elsewhere."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest

from core.training.monitor import Monitor
from experiments.train import logging_to
from tests import worlds

log = logging.getLogger("fewstep")


class Terminal(io.StringIO):
    """A terminal that remembers what it was sent."""

    def isatty(self) -> bool:
        return True


def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *, heartbeat_s: float) -> str:
    """What ``stream`` is sent by four ticks of a training, with a line of the log between them."""
    trained = worlds.trainer(tmp_path)
    monkeypatch.setattr(sys, "stderr", stream)
    with logging_to(trained.run):
        monitor = Monitor(trained.run, trained.clock, 1, heartbeat_s)
        for step in range(4):
            trained.clock.images += 4
            monitor.tick({"student/distill": 0.5})
            if step == 1:
                log.info("measuring")
        monitor.close()
    return stream.getvalue()


def test_what_is_logged_after_a_training_is_not_in_its_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = worlds.trainer(tmp_path)
    with logging_to(trained.run):
        log.info("inside")
    log.warning("outside")
    text = (trained.run.path / "log.txt").read_text()
    assert text.endswith("  inside\n") and "outside" in caplog.text


def test_lines_of_several_runs_on_one_terminal_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, stream = worlds.trainer(tmp_path), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with logging_to(trained.run, tmp_path / "other.log", name="ab12"):
        log.info("measuring")
        log.info("ab12 diverged")
    assert [re.sub(r"[\d:]{8}", "T", line) for line in stream.getvalue().splitlines()] == [
        "ab12  T  measuring",
        "T  ab12 diverged",
    ]
    told = (tmp_path / "other.log").read_text()
    assert re.sub(r"[\d:]{8}", "T", told) == "T  measuring\nT  ab12 diverged\n"
    assert (trained.run.path / "log.txt").read_text() == told


def test_lines_of_the_log_go_above_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(tmp_path, monkeypatch, Terminal(), heartbeat_s=0)
    assert re.search(r"\r *\r[\d:]+  measuring\n", text), "the bar is wiped before, and the line is its own"
    assert "ETA" not in text and "images" in text


def test_elsewhere_there_are_lines_with_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(tmp_path, monkeypatch, io.StringIO(), heartbeat_s=0).splitlines()
    assert len(lines) == 5 and lines[2].endswith("  measuring")
    assert all(re.search(r"\d+% +\d+ images +[\d.]+ images/s +ETA \d+ s$", line) for line in lines[:2] + lines[3:])
    (tmp_path / "slow").mkdir()
    (line,) = told(tmp_path / "slow", monkeypatch, io.StringIO(), heartbeat_s=60).splitlines()
    assert line.endswith("  measuring")
