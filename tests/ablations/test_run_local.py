"""Running a grid: real processes under submitit; a short job in the place of the training command."""

import os
import sys
from pathlib import Path

import pytest

from ablations import run_local
from ablations.grid import Cell, load
from ablations.run_local import LocalRunner
from ablations.status import statuses
from ablations.work import train_command
from core.run import Run
from experiments.cli import build_parser
from experiments.parser import parse

RUNS = Path("runs")
# What `fewstep train ... --evaluate` leaves behind, without networks: parents must be there, row `bad` fails.
JOB = """
import sys
from core.config import compose, resolve
from core.run import Run
config = resolve(compose(sys.argv[1], [a for a in sys.argv[2:] if "=" in a]))
if config.train.init_from:
    assert Run.open(config.train.init_from, config.execution.runs_dir).state() == "done"
run = Run.create(config)
with run.lock():
    run.begin_attempt()
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


def test_a_run_at_work_elsewhere_is_left_alone(file: str) -> None:
    cells = [cell for cell in load(file).expand("tiny") if cell.row == "good"]
    run, said = Run.create(cells[0].config), []
    with run.lock():
        ended = LocalRunner(cells, RUNS, 1, said.append).run()
    assert [s.state for s in ended] == ["running"] and "another process" in said[0]


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
