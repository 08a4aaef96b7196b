"""Submission without a cluster: mistakes in one line, this machine as a profile, disk space, estimates."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from ablations.estimate import Estimate, estimate, size_text
from ablations.grid import load
from ablations.job import CellsJob
from ablations.snapshot import held
from ablations.work import EVALUATE, TRAIN, Work
from core.run import Run, find_runs
from experiments.cli import main
from slurm.clean import superfluous
from slurm.ledger import Ledger
from slurm.local import background_pid
from slurm.profile import Profile
from slurm.queue import JobStatus
from slurm.resources import Resources
from slurm.status import bad_nodes, grid_status
from slurm.submit import Array, Submitter
from tests.slurm.waiting import wait

GRID = """
title: Cells
base: {tiny: flash/tiny, paper: flash/sd15}
seeds: [0, 1]
rows: [{id: one, label: One}, {id: other, label: Other, set: {method.student_lr: 1.0e-3}}]
metrics: [kd_effnet]
budgets:
  full: {}
  long: {set: {train.budget.amount: 200000}}
  quick: {seeds: [0], rows: [one], set: {eval.num_images: 8, eval.num_reference: 8}}
evaluate: {steps: [1]}
layout: {nfe: [1], splits: [train]}
"""


@pytest.fixture
def grid(tmp_path: Path) -> str:
    (tmp_path / "cells.yaml").write_text(GRID)
    return str(tmp_path / "cells.yaml")


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a wrong command says; nothing may have been submitted."""
    assert main([*words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert not list(Path("runs").rglob("intent.json"))
    return said.err


def profile(folder: Path, text: str) -> str:
    (folder / "site.yaml").write_text(text)
    return str(folder / "site.yaml")


def submit(*words: str) -> list[str]:
    return ["grid", "submit", *words, "--scale", "tiny", "--allow-dirty"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: gpu", "site.yaml: "),
        ("time_min: 9", "time_min=9 is out of range; allowed: at least 11"),
        ("{shared_dir: /dev/null/shared, executor: slurm}", "cannot write /dev/null/shared"),
        ("{cpus_per_node: 2, mem_gb_per_node: 1}", "flash/tiny needs mem_gb_per_node=4; the cluster's profile has 1"),
        ("failures_per_node: -1", "failures_per_node=-1 is out of range"),
    ],
)
def test_wrong_profiles(grid: str, tmp_path: Path, capsys, monkeypatch, text: str, words: str) -> None:
    monkeypatch.setattr("slurm.queue.Queue.max_array_size", lambda self: 1001)
    assert words in told(capsys, *submit(grid, "--cluster", profile(tmp_path, text)))


def test_names_that_a_job_file_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'a"b.yaml').write_text(GRID)
    said = told(capsys, *submit(str(tmp_path / 'a"b.yaml'), "--cluster", "test"))
    assert "grid='a\"b' has characters that a job file cannot hold" in said
    (tmp_path / "cells.yaml").write_text(GRID)
    said = told(capsys, *submit(str(tmp_path / "cells.yaml"), "--cluster", "test", "--runs-dir", "a\nb"))
    assert "a\\nb" in said and "line breaks" in said


def test_more_processes_than_the_batch_can_be_shared_by(grid: str, tmp_path: Path) -> None:
    submitter = Submitter("cells", Profile(cpus_per_node=64, mem_gb_per_node=64), tmp_path / "runs", tmp_path, print)
    works = [Work(TRAIN, cell) for cell in load(grid).expand("tiny")]
    with pytest.raises(ValueError, match="3 processes do not divide train.batch_size=4"):
        list(submitter.arrays(works, nodes=3))


def test_packs_are_refused_where_each_cell_has_its_own_process(
    grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    debug = profile(tmp_path, "executor: debug")
    assert "--pack=2: --cluster debug trains one cell" in told(capsys, *submit(grid, "--cluster", debug, "--pack", "2"))
    said = told(capsys, *submit(grid, "--cluster", "local", "--write", "jobs", "--pack", "2"))
    assert "--pack=2: --write makes a file for each cell" in said
    assert "--pack=0 is out of range; allowed: at least 1" in told(capsys, *submit(grid, "--pack", "0"))


@pytest.fixture
def without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop: git, and no command of SLURM's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").symlink_to(str(shutil.which("git")))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")


def test_a_machine_without_slurm_submits_nothing(
    grid: str, without_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(capsys, *submit(grid, "--cluster", "test"))
    assert "is not on this machine; submit from a login node of the cluster" in said


def test_a_dry_run_needs_no_slurm_and_changes_nothing(
    grid: str, without_slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = "{partition: gpu, cpus_per_node: 8, mem_gb_per_node: 64, time_min: 90, max_parallel: 2}"
    words = submit(grid, "--cluster", profile(tmp_path, site), "--dry-run", "--cells-per-job", "3")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert not Path("runs").exists()
    size = (
        "each nodes=1 processes_per_node=1 gpus_per_process=0 cpus_per_process=2 mem_gb=4 cells_per_job=3 time_min=90"
    )
    assert f"array 1: train 4 cells in 2 tasks, {size}\n" in said
    assert f"array 2: evaluate 4 cells in 2 tasks, {size}\n" in said
    assert said.count("#SBATCH --array=0-1%2") == 2 and said.count("#SBATCH --partition=gpu") == 2
    assert "2 arrays with 4 jobs would be submitted\nno SLURM answers here: what was submitted before" in said

    ledger = Ledger(Path("runs"))  # an intent whose submitter died; a machine without SLURM cannot say whether it came
    intent = ledger.intend("cells", TRAIN, [["a"]], {})
    record = json.loads((intent.folder / "intent.json").read_text()) | {"created": 0.0}
    (intent.folder / "intent.json").write_text(json.dumps(record))
    assert main(words) == 0
    assert [one.abandoned for one in ledger.submissions()] == [False] and not (ledger.root / "lock").exists()


def test_a_full_disk_is_one_line_and_submits_nothing(grid: str, tmp_path: Path) -> None:
    """A limit on the size of files fails where a full quota would: while the snapshot is written."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *submit(grid, "--cluster", "test"), "--runs-dir", f"{tmp_path}/runs"],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1
    assert "File size limit exceeded" in done.stderr and not list(tmp_path.rglob("intent.json"))
    assert not list((tmp_path / "runs/.slurm/code").glob("[!.]*")), "a half-written snapshot is not used"


def test_a_damaged_submission_is_named(grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "other/.slurm/submissions/x"
    folder.mkdir(parents=True)
    (folder / "intent.json").write_text("{")
    said = told(capsys, *submit(grid, "--cluster", "test", "--dry-run", "--runs-dir", str(tmp_path / "other")))
    assert str(folder) in said and "is damaged" in said


@pytest.mark.slow
def test_this_machine_as_a_cluster(grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Submitted to the background, told as running there, and cancelled; what is saved goes on later."""
    runs = tmp_path / "runs"
    words = [*submit(grid, "--cluster", "local"), "--runs-dir", str(runs), "--budget", "long"]
    assert main(words) == 0
    pid = background_pid(runs)
    assert pid is not None and f"pid {pid}" in capsys.readouterr().out
    cancel = ["grid", "cancel", grid, "--scale", "tiny", "--runs-dir", str(runs)]
    try:
        assert main(words) == 2 and f"pid {pid} is running a grid" in capsys.readouterr().err
        wait(lambda: [Run.open(path).state() for path in find_runs(runs)] == ["running"] * 2)
        wait(lambda: len({path.parent.parent for path in runs.rglob("state/*/COMPLETE")}) == 2)
    finally:  # whatever failed: no training outlives the test
        assert main(cancel) == 0
    assert "the grid that runs on this machine: cancelled" in capsys.readouterr().out
    wait(lambda: background_pid(runs) is None)
    wait(lambda: [Run.open(path).state() for path in find_runs(runs)] == ["planned"] * 2)


@pytest.mark.slow
def test_inside_this_process(grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    assert main([*submit(grid, "--cluster", "debug"), "--runs-dir", str(runs), "--budget", "quick"]) == 0
    (run,) = map(Run.open, find_runs(runs))
    assert run.state() == "done" and [line["metric"] for line in run.evals()] == ["kd_effnet"]


def finished(folder: Path, cell: object, images: int, hours: float) -> Run:
    """A run that is done, as the trainer leaves it."""
    cell.config.execution.runs_dir = str(folder)
    run = Run.create(cell.config)
    run.begin_attempt()
    line = {"attempt": 1, "images": images, "device_hours": hours, "evaluations": {}, "stored_evaluations": 0}
    run.append_metrics(line)
    for name in ("state/0000000016", "snapshots/0000000032"):
        (run.path / name).mkdir(parents=True)
        (run.path / name / "student.safetensors").write_bytes(b"0" * 10_000)
    run.end_attempt("done")
    return run


def test_clean_keeps_what_resumes_and_what_is_used(grid: str, tmp_path: Path) -> None:
    cells = load(grid).expand("tiny")
    done, going_on = (finished(tmp_path / "runs", cell, 32, 0.5) for cell in cells[:2])
    going_on.end_attempt("stopped")
    old = tmp_path / "runs" / ".metrics.jsonl.abcd1234"
    old.write_text("half")
    os.utime(old, (0, 0))
    store = tmp_path / "cache/solutions"
    weights = cells[0].config.backbone.weights_hash
    for name, seed, teacher in (("posed", 1, weights), ("nobody", 7, weights), ("another", 1, "another teacher")):
        (store / name).mkdir(parents=True)
        problem = {"num_timesteps": 8, "timestep_distribution": "mixture", "mixture_variance": 0.5, "guidance_min": 3.0}
        problem |= {"guidance_max": 13.0, "solver": "dpmpp_2m", "stage_weights": cells[0].config.method.stage_weights}
        problem |= {"seed": seed, "precision": "fp32", "samples": 32, "stages": [0, 8, 16, 24]}
        problem |= {"teacher": teacher, "data": "d"}
        (store / name / "key.json").write_text(json.dumps(problem))
    assert going_on.config.seed == 1
    kept = {path for path, _ in superfluous(tmp_path / "runs", tmp_path / "cache")}
    assert kept == {done.path / "state", old}
    assert {path for path, _ in superfluous(tmp_path / "runs", tmp_path / "cache", solutions=True)} - kept == {
        store / "nobody",
        store / "another",
    }
    places = ["--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["clean", "--dry-run", *places]) == 0 and (done.path / "state").exists()
    assert main(["clean", *places]) == 0
    assert not (done.path / "state").exists() and not old.exists() and (going_on.path / "state").exists()
    assert (done.path / "snapshots").exists() and Run.open(done.path).state() == "done"


def test_clean_keeps_the_code_of_a_grid_on_this_machine(tmp_path: Path) -> None:
    code = Ledger(tmp_path / "runs").root / "code/0123"
    code.mkdir(parents=True)
    (code / "COMMIT").write_text("0\n")

    def found() -> list[tuple[Path, str]]:
        return list(superfluous(tmp_path / "runs", tmp_path / "cache"))

    with held(code):
        assert found() == []
    assert found() == [(code, "no job runs from this code")]


def test_what_a_grid_will_take_is_told_from_finished_runs(grid: str, tmp_path: Path) -> None:
    cells = load(grid).expand("tiny")
    assert estimate(cells, tmp_path / "runs").unknown == ("flash/tiny",)
    finished(tmp_path / "runs", cells[0], 16, 0.5)
    found = estimate(cells[1:], tmp_path / "runs")
    assert found.device_hours == pytest.approx(3 * 32 * 0.5 / 16) and found.runs_bytes > 3 * 20_000
    assert found.solutions_bytes == 2 * 32 * 4 * 16 * 8 * 8, "two seeds; rows that differ in the rate share"
    assert str(Estimate(1.5, 2e9, 3e6)) == "about 1.5 device-hours, 2 GB of runs, at most 3 MB of teacher solutions"
    assert [size_text(n) for n in (0, 999, 1500, 2e13)] == ["0 B", "999 B", "1.5 KB", "20 TB"]


@pytest.mark.parametrize(("heard", "save_s"), [("", 1.0), ("exit 75", 60.0)])
def test_a_job_that_must_leave_waits_as_long_as_the_profile_says(tmp_path: Path, heard: str, save_s: float) -> None:
    """For a training that does not end; no longer than it needs for one that does. Its successor does the same."""
    script = f"trap '{heard}' USR2; touch {tmp_path}/ready; for i in $(seq 100); do sleep .1; done"
    job = CellsJob([(str(tmp_path / "log"), ["bash", "-c", script])], save_s=save_s)
    running = threading.Thread(target=lambda: pytest.raises(RuntimeError, job), daemon=True)
    running.start()
    wait((tmp_path / "ready").exists)
    start = time.monotonic()
    again = job.checkpoint()
    assert (time.monotonic() - start >= save_s) == (heard == "") and time.monotonic() - start < 8
    assert again.function.save_s == save_s
    for child in job._children:
        child.kill()


def test_the_time_to_save_follows_the_profiles_signal(tmp_path: Path) -> None:
    for signal_s, save_s in ((10, 30), (120, 90), (1200, 900)):
        submitter = Submitter("cells", Profile(signal_s=signal_s), tmp_path / "runs", tmp_path, print)
        assert submitter._job([], Resources()).save_s == save_s


def test_logs_open_in_a_folder_that_is_there_when_a_job_starts(grid: str, tmp_path: Path) -> None:
    """submitit makes a folder of the job's own only after sbatch, which a job that starts at once does not wait for."""
    submitter = Submitter("cells", Profile(cpus_per_node=8, mem_gb_per_node=64), tmp_path / "runs", tmp_path, print)
    submitter.most_tasks = 3
    array = next(submitter.arrays([Work(TRAIN, cell) for cell in load(grid).expand("tiny")]))
    text = submitter.sbatch_text(array)
    folders = {str(Path(log).parent) for log in re.findall(r"--(?:output|error)[= ](\S+)", text)}
    folder = submitter.ledger.job_folder
    assert folders == {str(folder)} and text.rstrip().endswith(f"_submit {folder}") and "%" not in str(folder)


def test_what_measures_follows_what_trains(grid: str, tmp_path: Path) -> None:
    submitter = Submitter("cells", Profile(cpus_per_node=8, mem_gb_per_node=64), tmp_path / "runs", tmp_path, print)
    submitter.most_tasks = 3
    works = [Work(kind, cell) for cell in load(grid).expand("tiny") for kind in (TRAIN, EVALUATE)]
    arrays = list(submitter.arrays(works))
    assert [(array.kind, len(array.tasks)) for array in arrays] == [
        (TRAIN, 3), (EVALUATE, 3), (TRAIN, 1), (EVALUATE, 1)
    ]  # fmt: skip
    assert arrays[1].mirrors is arrays[0] and arrays[3].mirrors is arrays[2]
    for training, measuring in (arrays[:2], arrays[2:]):
        assert [w.cell.id for w in training.work] == [w.cell.id for w in measuring.work]
    command = submitter.command(arrays[1].work[0], arrays[1].resources)
    assert command[1:4] == ["-m", "experiments.evaluate", "--finished"]
    assert "--evaluate" not in submitter.command(arrays[0].work[0], arrays[0].resources)
    assert "--evaluate" in submitter.command(arrays[0].work[0], arrays[0].resources, whole=True)


def test_a_child_and_a_measurement_wait_for_what_comes_first(tmp_path: Path) -> None:
    rows = "rows: [{id: child, parent: elder}, {id: elder, set: {method.student_lr: 1.0e-3}}]"
    (tmp_path / "family.yaml").write_text(f"title: T\nbase: {{tiny: flash/tiny}}\nmetrics: [kd_effnet]\n{rows}\n")
    elder, child = load(str(tmp_path / "family.yaml")).expand("tiny")
    measured = (Work(EVALUATE, elder), Work(EVALUATE, child))
    assert Array(Resources(), ((Work(TRAIN, elder),),)).runs_needed == []
    assert Array(Resources(), ((Work(TRAIN, child),),)).runs_needed == [elder.id]
    assert Array(Resources(), (measured,)).runs_needed == [elder.id, child.id]


def test_a_job_that_ends_while_slurm_is_asked_has_not_failed(grid: str, tmp_path: Path) -> None:
    """A busy controller answers late; what the run's folder said before that is out of date."""
    (cell, *_) = load(grid).expand("tiny", "quick")
    cell.config.execution.runs_dir = str(tmp_path / "runs")
    ledger = Ledger(tmp_path / "runs")
    ledger.confirm(ledger.intend("cells", TRAIN, [[cell.id]], {}), ["7"])

    class Late:
        def statuses(self, jobs: Iterable[str]) -> dict[str, JobStatus]:
            assert list(jobs) == ["7"]
            run = Run.create(cell.config)
            run.begin_attempt()
            run.end_attempt("done")
            return {"7": JobStatus("7", "x", "COMPLETED", "n1")}

    (found,) = grid_status([cell], tmp_path / "runs", Late())
    assert (found.state, found.work.kind) == ("trained", EVALUATE)


def test_only_nodes_on_which_nothing_works_are_bad() -> None:
    def jobs(node: str, *states: str) -> list[JobStatus]:
        return [JobStatus(f"{node}{i}", "x", state, node) for i, state in enumerate(states)]

    good, bad = jobs("n1", "COMPLETED", "FAILED", "FAILED", "FAILED"), jobs("n2", "FAILED", "FAILED", "NODE_FAIL")
    assert bad_nodes([*good, *bad], 2) == ["n2"] and bad_nodes([*good, *bad], 3) == []
    assert bad_nodes(bad, 2) == [], "where everything fails, the nodes are not to blame"
    assert bad_nodes([*good, *jobs("n[2-3]", *["FAILED"] * 9)], 2) == [], "several nodes: nobody knows which"


def test_a_cell_s_measurement_is_known_by_what_is_measured(grid: str, tmp_path: Path) -> None:
    first, second = (load(grid).expand("tiny", budget)[0] for budget in ("full", "quick"))
    assert Work(TRAIN, first).key == Work(TRAIN, second).key == first.id
    keys = {Work(EVALUATE, first).key, Work(EVALUATE, second).key}
    assert len(keys) == 2 and all(key.startswith(f"{first.id}-") for key in keys)
