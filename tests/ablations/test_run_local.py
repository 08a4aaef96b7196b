"""Running a grid: real processes; a short job in the place of the training command."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ablations import run_local
from ablations.grid import Cell, load
from ablations.run_local import LocalRunner
from ablations.status import statuses
from ablations.work import train_command
from core.run import Run, find_runs
from experiments.cli import build_parser
from experiments.parser import parse
from tests.slurm.waiting import wait

RUNS = Path("runs")
# What `fewstep train ... --evaluate` leaves behind, without networks: parents must be there, row `bad` fails. It ends
# when there is no file `hold`.
JOB = """
import signal
import sys
import time
from pathlib import Path
from core.config import compose, resolve
from core.run import Run
experiment, *overrides = [word for word in sys.argv[1:] if word != "--evaluate"]
config = resolve(compose(experiment, overrides))
if config.train.init_from:
    assert Run.open(config.train.init_from, config.execution.runs_dir).state() == "done"
run = Run.create(config)

def leave(*_):
    time.sleep(1)  # a large state takes its time
    sys.exit(run.end_attempt("stopped"))

with run.lock():
    run.begin_attempt()
    signal.signal(signal.SIGTERM, leave)
    print("at work", flush=True)
    while Path("hold").exists():
        time.sleep(0.1)
    if config.execution.label.startswith("lost"):
        run.end_attempt("diverged", "gradients not finite")
        sys.exit(1)
    if config.execution.label.startswith("bad"):
        run.end_attempt("failed", "out of luck")
        sys.exit("error: out of luck")
    for split in config.eval.splits:
        for steps in config.eval.steps:
            fields = {"num_images": config.eval.num_images, "num_reference": 16, "images_per_prompt": 1}
            fields |= {"solver": config.eval.sampler, "steps": steps}
            line = {"metric": "kid", "split": split, "steps": steps, "weights": "student", "images": 32}
            run.append_eval(line | {"n": 8, "protocol": fields["solver"], "protocol_fields": fields, "value": 1.0})
    run.end_attempt("done")
"""
GRID = """
title: T
base: {tiny: flash/tiny}
metrics: [kid]
layout: {nfe: [1], splits: [train]}
evaluate: {steps: [1, 2]}
rows:
  - {id: child, parent: good}
  - {id: orphan, parent: bad}
  - {id: good}
  - {id: twin, set: {method.mixture_variance: 0.5}}
  - {id: ddim, set: {eval.sampler: ddim}}  # the same run as good, measured in another way
  - {id: bad, set: {method.num_timesteps: 16}}
  - {id: bad-ddim, set: {method.num_timesteps: 16, eval.sampler: ddim}}
budgets:
  full: {set: {data.path: "random:x"}}
  larger: {set: {data.path: "random:x", eval.num_images: 9}}
"""


def job(cell: Cell, runs_dir: Path, threads: int) -> list[str]:
    return [sys.executable, "-c", JOB, cell.experiment, *cell.overrides, f"execution.runs_dir={runs_dir}"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    root = str(Path(__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    monkeypatch.setattr(run_local, "train_command", job)
    (tmp_path / "g.yaml").write_text(GRID)
    return str(tmp_path / "g.yaml")


def test_a_parent_that_diverged_stops_its_children_with_one_line_each(file: str) -> None:
    """Now, and when the grid is run again; what does not descend from it goes on."""
    rows = "rows:\n  - {id: heir, parent: lost}\n  - {id: grandchild, parent: heir, set: {method.num_timesteps: 16}}\n"
    rows += "  - {id: lost}\n  - {id: other, set: {method.num_timesteps: 16}}\n"
    text = Path(file).read_text()
    Path(file).write_text(text[: text.index("rows:")] + rows + text[text.index("budgets:") :])
    cells = load(file).expand("tiny")
    for started in (2, 0):
        said: list[str] = []
        states = {s.cell.row: s.state for s in LocalRunner(cells, RUNS, 2, said.append).run()}
        assert states == {"lost": "diverged", "heir": "planned", "grandchild": "planned", "other": "done"}
        assert sum("  started" in line for line in said) == started
        lost = next(cell.id for cell in cells if cell.row == "lost")
        (line,) = (line for line in said if "heir-s0" in line)
        assert line.endswith(f"not started: its parent {lost} has diverged")
        assert sum("grandchild-s0" in line for line in said) == 1


def test_run_shares_resumes_and_survives_a_failure(file: str) -> None:
    cells, said = load(file).expand("tiny"), []
    states = {s.cell.row: s.state for s in LocalRunner(cells, RUNS, 2, said.append).run()}
    expected = {"good": "done", "child": "done", "ddim": "done", "bad": "failed", "bad-ddim": "planned"}
    assert states == expected | {"orphan": "planned"}  # twin is good
    assert sum("  started" in line for line in said) == 4
    assert len({cell.id for cell in cells if cell.row in ("good", "twin", "ddim")}) == 1
    assert any("bad-s0" in line and "failed" in line and "out of luck" in line for line in said)
    assert any("orphan-s0" in line and "not started: its parent" in line for line in said)
    assert any("bad-ddim-s0" in line and "not started: its run has failed" in line for line in said)

    done = [cell for cell in cells if cell.row in ("good", "twin", "ddim", "child")]
    said.clear()
    assert all(s.state == "done" for s in LocalRunner(done, RUNS, 2, said.append).run()) and not said

    larger = statuses([c for c in load(file).expand("tiny", "larger") if c.row == "good"], RUNS)
    assert [s.state for s in larger] == ["trained"]
    assert larger[0].reason == "2 numbers to measure, first: kid train 1 steps"


DRIVER = """
from pathlib import Path
from ablations import run_local
from ablations.grid import load
from tests.ablations.test_run_local import job, of_rows
run_local.train_command = job
run_local.LocalRunner(of_rows("g.yaml", "good", "child"), Path("runs"), 1, print).run()
"""


def of_rows(file: str, *rows: str) -> list[Cell]:
    return [cell for cell in load(file).expand("tiny") if cell.row in rows]


def test_a_training_that_outlives_a_killed_grid_is_waited_for(file: str) -> None:
    Path("hold").touch()
    killed = subprocess.Popen([sys.executable, "-c", DRIVER], start_new_session=True)
    try:
        wait(lambda: [Run.open(path).state() for path in find_runs(RUNS)] == ["running"])
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            Path("hold").unlink(missing_ok=True)

        ended = LocalRunner(of_rows(file, "good", "child", "twin", "ddim"), RUNS, 1, say).run()
    finally:
        Path("hold").unlink(missing_ok=True)
    assert "good-s0" in said[0] and said[0].endswith("is being trained by another process; waiting for it")
    assert "good-s0" in said[1] and said[1].endswith("the other process has left it done")
    assert {item.cell.row: item.state for item in ended} == {"good": "done", "child": "done", "ddim": "done"}
    (good,) = (Run.open(path) for path in find_runs(RUNS) if path.name.startswith("good"))
    assert good.noted("attempt") == 2, "the orphan trained it; a second job measured it as row ddim asks for"


def test_a_grid_that_is_interrupted_waits_for_its_trainings_to_save(file: str) -> None:
    Path("hold").touch()
    grid = subprocess.Popen([sys.executable, "-c", DRIVER], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: any("at work" in path.read_text() for path in RUNS.rglob("*.log")), 60)
        os.kill(grid.pid, signal.SIGINT)
        assert grid.wait() != 0
    finally:
        Path("hold").unlink(missing_ok=True)
    (run,) = map(Run.open, find_runs(RUNS))
    assert run.noted("state") == "stopped" and run.state() == "planned"


def test_a_run_that_another_process_takes_first_is_waited_for(file: str) -> None:
    """Two grids start the same cell; the job of the slower one fails at the lock, and the cell has not failed."""
    (cell,) = of_rows(file, "good")
    run, said = Run.create(cell.config), []

    with contextlib.ExitStack() as lock:

        def say(text: str) -> None:
            said.append(text.partition(f"{cell.id}  ")[2].partition(" ")[0])
            if said == ["started"]:
                lock.enter_context(run.lock())
            if said[-1] == "is":
                lock.close()

        (ended,) = LocalRunner([cell], RUNS, 1, say).run()
    assert said == ["started", "is", "the", "started", "done"] and ended.state == "done"


def test_what_another_machine_is_at_takes_no_slot(file: str) -> None:
    """Several machines on one file system share a grid; none waits for another before all of its own is done."""
    cells, said = of_rows(file, "good", "bad"), []
    run = Run.create(cells[0].config)
    with run.lock():
        run.begin_attempt()
    run.note(host="elsewhere")
    with contextlib.ExitStack() as lock:
        lock.enter_context(run.lock())

        def say(text: str) -> None:
            said.append(text)
            if " failed after " in text:
                lock.close()

        LocalRunner(cells, RUNS, 1, say).run()
    rows = [text.split()[2] for text in said]
    assert rows == ["good-s0", "bad-s0", "bad-s0", "good-s0", "good-s0", "good-s0"]


def test_the_command_line_takes_the_job_s_command(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.config import compose

    monkeypatch.undo()
    cell = load(file).expand("tiny")[0]
    command = train_command(cell, Path("my runs, (1)"), 3)
    assert command[1:3] == ["-m", "experiments.train"]
    arguments = parse(build_parser(), ["train", *command[3:]])
    assert arguments.evaluate and arguments.experiment == "flash/tiny"
    config = compose(arguments.experiment, arguments.overrides)
    assert config.execution.num_threads == 3
    assert config.execution.runs_dir == "my runs, (1)" and config.train.parent is None
