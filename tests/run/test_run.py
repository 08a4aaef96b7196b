"""The run folder: atomic files, one trainer at a time, state from files, records that survive a crash."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from core.config import ExperimentConfig, UserError, compose, resolve
from core.run import KILLED, Run, atomic_folder, atomic_write, find_runs


def config(*overrides: str) -> ExperimentConfig:
    return resolve(compose("flash/tiny", ["data.path=random:noise", *overrides]))


def evaluation(value: float, **changes: Any) -> dict[str, Any]:
    line = {"metric": "kid", "split": "train", "steps": 4, "weights": "student", "images": 8, "protocol": "p"}
    return line | {"value": value, "n": 10} | changes


def test_same_configuration_is_same_folder_whatever_its_label() -> None:
    first = Run.create(config("execution.label=a"))
    assert first.path == Path("runs/flash/tiny") / f"a-{first.id}"
    assert Run.create(config("execution.label=b")).path == first.path
    assert Run.create(config("seed=1")).path != first.path
    assert len(list(find_runs("runs"))) == 2


def test_open_by_folder_and_by_id_reads_what_was_written() -> None:
    run = Run.create(config())
    assert Run.open(run.path).config == Run.open(run.id).config == run.config
    stored = json.loads((run.path / "provenance.json").read_text())
    assert stored["data_hash"] == "random:noise" and stored["packages"]["omegaconf"]


def test_open_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="'0123456789' is neither a run folder nor the id of a run in runs/"):
        Run.open("0123456789")


def test_unwritable_runs_dir_is_a_user_s_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/runs.*: Not a directory"):
        Run.create(config(f"execution.runs_dir={tmp_path / 'file' / 'runs'}"))


def test_state_follows_attempts() -> None:
    run = Run.create(config())
    assert run.state() == "planned"
    assert run.begin_attempt(device="cpu") == 1
    assert (run.state(), run.reason()) == ("failed", KILLED)  # open, and nobody holds the lock
    run.end_attempt("stopped", "preempted")
    assert run.state() == "planned"
    assert run.begin_attempt() == 2
    run.end_attempt("diverged", "loss is nan")
    assert (run.state(), run.reason()) == ("diverged", "loss is nan")
    run.begin_attempt()
    run.end_attempt("done")
    assert run.state() == "done"


def test_lock_keeps_a_second_trainer_out_and_shows_the_run_at_work() -> None:
    run = Run.create(config())
    other = Run.open(run.path)
    run.begin_attempt()
    run.end_attempt("done")
    with run.lock():
        assert run.state() == "done"  # the holder asks about earlier attempts
        assert other.state() == "running"
        message = f"{run.id} is being trained by pid {os.getpid()} on host"
        with pytest.raises(UserError, match=message), other.lock():
            pass
    assert other.state() == "done"


def test_a_killed_trainer_leaves_no_lock() -> None:
    run = Run.create(config())
    code = (
        "import sys, time; from core.run import Run\nr = Run.open(sys.argv[1])\n"
        "with r.lock():\n    r.begin_attempt(); print('locked', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert child.stdout is not None and child.stdout.readline() == b"locked\n"
    assert run.state() == "running"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (run.state(), run.reason()) == ("failed", KILLED)
    with run.lock():
        assert run.begin_attempt() == 2


def test_fresh_heartbeat_of_another_host_counts_as_running() -> None:
    run = Run.create(config())
    run.begin_attempt()
    run.heartbeat({"host": "elsewhere"})
    assert run.state() == "running"
    run.heartbeat({"host": "elsewhere", "time": time.time() - 4 * run.config.execution.heartbeat_s})
    assert run.state() == "failed"


def test_metrics_rewind_and_a_torn_line_is_lost_alone() -> None:
    run = Run.create(config())
    for images in (4, 8):
        run.append_metrics({"attempt": 1, "images": images})
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"attempt":1,"ima')
    run.append_metrics({"attempt": 2, "images": 12})
    assert [line["images"] for line in run.metrics()] == [4, 8, 12]
    run.rewind_metrics(8)
    assert [line["images"] for line in run.metrics()] == [4, 8]


def test_newest_value_of_one_protocol_wins() -> None:
    run = Run.create(config())
    for value, changes in ((1.0, {}), (2.0, {"protocol": "q"}), (3.0, {})):
        run.append_eval(evaluation(value, **changes))
    assert {(line["protocol"], line["value"]) for line in run.evals()} == {("p", 3.0), ("q", 2.0)}
    assert all(line["run"] == run.id for line in run.evals())


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x" / "file"
    atomic_write(target, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*file: No space left on device"):
        atomic_write(target, "new")
    assert target.read_text() == "old" and os.listdir(target.parent) == ["file"]


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with atomic_folder(folder) as new:
        (new / "a").write_text("1")
        (new / "a").chmod(0o600)
        assert not folder.exists()
    assert (folder / "a").stat().st_mode & 0o777 == 0o644
    with pytest.raises(RuntimeError), atomic_folder(folder) as new:
        (new / "b").write_text("2")
        raise RuntimeError
    assert os.listdir(folder) == ["a"]
    with atomic_folder(folder) as new:
        (new / "c").write_text("3")
    assert os.listdir(folder) == ["c"] and os.listdir(tmp_path) == ["state"]
