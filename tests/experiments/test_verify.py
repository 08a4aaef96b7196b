"""A finished run is checked and trained again: what is damaged fails, what is rebuilt agrees bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from core.config import compose, resolve
from core.run import Run
from experiments.cli import main
from experiments.rerun import rerun
from experiments.train import train_config
from experiments.verify import FAILED, UNKNOWN, verify

SMALL = [
    "eval.metrics=[kd_effnet,diversity]", "eval.splits=[train]", "eval.steps=[1,2]", "eval.num_images=6",
    "eval.num_reference=8", "eval.num_diversity_prompts=2", "eval.images_per_prompt=2", "execution.num_threads=1",
    "execution.solve_batch=8", "train.precision=bf16",  # what is solved together decides the last digits
]  # fmt: skip


CHECKS = ("identity", "weights", "data", "code", "origin", "training", "log", "numbers", "packages")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained and measured run."""
    root = tmp_path_factory.mktemp("finished")
    config = resolve(compose("flash/tiny", [*SMALL, f"execution.runs_dir={root}/runs"]))
    config.execution.cache_dir = str(root / "cache")
    assert train_config(config, evaluate=True) == 0
    return Run.create(config).path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A copy that a test may damage; it was made from a clean commit, whatever the checkout is."""
    path = shutil.copytree(finished, tmp_path / finished.name)
    file = path / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dirty_patch": ""}))
    return Run.open(path)


def outcome(run: Run, name: str) -> str:
    return next(check.outcome for check in verify(Run.open(run.path)) if check.name == name)


def test_a_sound_run_passes(run: Run, capsys: pytest.CaptureFixture) -> None:
    checks = verify(Run.open(run.path))
    assert {c.name for c in checks} == {*CHECKS}
    assert FAILED not in {check.outcome for check in checks}
    assert main(["verify", str(run.path)]) == 0
    assert "4 with their protocols" in capsys.readouterr().out


def test_a_changed_configuration_is_found(run: Run) -> None:
    file = run.path / "config.yaml"
    file.write_text(file.read_text().replace("student_lr: ", "student_lr: 1"))
    assert outcome(run, "identity") == FAILED
    assert main(["verify", str(run.path)]) == 1


def test_a_changed_number_is_found(run: Run) -> None:
    file = run.path / "evals.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for change in (
        {"value": float("nan")},
        {"run": "0123456789"},
        {"protocol_fields": {**lines[0]["protocol_fields"], "num_images": 7}},
    ):
        file.write_text("".join(json.dumps(line) + "\n" for line in [lines[0] | change, *lines[1:]]))
        assert outcome(run, "numbers") == FAILED


def test_an_uncommitted_change_and_an_unfinished_training_are_found(run: Run) -> None:
    file = run.path / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dirty_patch": "diff"}))
    assert outcome(run, "code") == FAILED
    run.begin_attempt()
    run.end_attempt("stopped")
    assert outcome(run, "training") == FAILED


def test_lost_lines_of_the_log_are_found(run: Run) -> None:
    run.rewind_metrics(0)
    assert outcome(run, "training") == FAILED


def test_a_commit_of_nobody_is_unknown_and_not_wrong(run: Run) -> None:
    file = run.path / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "0" * 40}))
    assert outcome(run, "code") == UNKNOWN


def test_a_second_training_gives_the_same_bits(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    agreements = rerun(run, tmp_path / "again")
    assert len(agreements) == 4 and all(a.relative == 0 for a in agreements)
    first, second = (
        next(p.glob("snapshots/*/student.safetensors")) for p in (run.path, *(tmp_path / "again").glob("*/*/*"))
    )
    assert first.read_bytes() == second.read_bytes() and first != second
    solved = [[line["ahead_evaluations"] for line in Run.open(path.parents[2]).metrics()] for path in (first, second)]
    assert solved[0] == solved[1] and solved[0][-1] > 0, "the teacher's problems are solved together as before"
    assert not list((tmp_path / "again").glob("solutions*"))

    file = run.path / "evals.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["value"] *= 1.05
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["rerun", str(run.path), "--out", str(tmp_path / "again")]) == 1  # the second run is there already
    assert "DISAGREE: 4 numbers, the worst differs by 4.76%" in capsys.readouterr().out
    assert main(["rerun", str(run.path), "--out", str(tmp_path / "again"), "--tolerance", "0.05"]) == 0


def test_a_run_without_numbers_has_nothing_to_agree_with(run: Run, capsys: pytest.CaptureFixture) -> None:
    (run.path / "evals.jsonl").write_text("")
    assert main(["rerun", str(run.path)]) == 2
    assert "has no numbers to compare with" in capsys.readouterr().err
