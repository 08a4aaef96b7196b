"""The comparison of two revisions finds what was planted, says where, and shares nothing between the two."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.config import UserError
from tests.compare.__main__ import IDENTICAL, NEW, of_experiment
from tests.compare.differences import first_difference, of_json
from tests.compare.replay import run
from tests.compare.revisions import Side, checkouts

LINES = [
    {"images": 4, "seconds": 0.3, "evaluations": {"teacher": 24}, "student/distill": 1.5},
    {"images": 8, "seconds": 0.5, "evaluations": {"teacher": 54}, "student/distill": float("nan")},
]


def leave_run(folder: Path, lines: list[dict], weight: float = 1.0, identity: str = "a2d5f40b61") -> Path:
    """A run folder with what is compared."""
    run_folder = folder / identity
    snapshot = run_folder / "snapshots" / "0000000008"
    snapshot.mkdir(parents=True)
    (run_folder / "config.yaml").write_text("seed: 0\n")
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {"down": np.ones(3, np.float32), "up": np.full(3, weight, np.float32)}
    save_file(tensors, snapshot / "student.safetensors", metadata={"written": folder.name})
    return run_folder


def changed(row: int, **values: object) -> list[dict]:
    """LINES with other values in one row."""
    return [line | values if index == row else line for index, line in enumerate(LINES)]


@pytest.mark.parametrize(
    ("lines", "weight", "said"),
    [
        (LINES, 1.0, None),
        (changed(1, seconds=9.0), 1.0, None),
        (changed(1, evaluations={"teacher": 55}), 1.0, "metrics.jsonl row 2, evaluations.teacher: 54 | 55"),
        (changed(0, **{"student/dmd": 0.1}), 1.0, "metrics.jsonl row 1, student/dmd: absent | 0.1"),
        (LINES[:1], 1.0, "metrics.jsonl: 2 rows | 1 rows"),
    ],
)
def test_the_first_difference_of_two_runs_is_named(
    tmp_path: Path, lines: list[dict], weight: float, said: str | None
) -> None:
    before, after = leave_run(tmp_path / "before", LINES), leave_run(tmp_path / "after", lines, weight)
    assert first_difference(before, after) == said


def test_a_weight_that_differs_is_named_with_its_file(tmp_path: Path) -> None:
    smallest = float(np.nextafter(np.float32(1), np.float32(2)))
    before, after = leave_run(tmp_path / "before", LINES), leave_run(tmp_path / "after", LINES, smallest)
    said = first_difference(before, after)
    assert said is not None and said.startswith("snapshots/0000000008/student.safetensors, up: 'F32[3] ")


def test_another_identity_comes_first(tmp_path: Path) -> None:
    before, after = leave_run(tmp_path / "a", LINES), leave_run(tmp_path / "b", LINES, identity="ffffffffff")
    assert first_difference(before, after) == "run id: a2d5f40b61 | ffffffffff"


def test_a_point_of_a_curve_is_named(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flash.json").write_text(json.dumps({"student/distill": [1.0, value]}))
    assert of_json(tmp_path / "a/flash.json", tmp_path / "b/flash.json") == "flash.json, student/distill.2: 0.5 | 0.25"


def side(folder: Path, code: int = 0, said: str = "# run 1", experiment: str = "flash/tiny") -> Side:
    """One side on which the experiment was run, or failed."""
    out = Side(folder / "code", folder)
    yaml = out.code / "experiments" / "config" / "experiment" / f"{experiment}.yaml"
    for file in (yaml, out.log("x")):
        file.parent.mkdir(parents=True)
    yaml.touch()
    leave_run(folder / "runs" / experiment, LINES)
    results = {experiment: {"code": code, "dropped": []}, f"config {experiment}": {"code": 0, "dropped": []}}
    (folder / "results.json").write_text(json.dumps(results))
    for job in results:
        out.log(job).write_text(said)
    return out


def test_what_failed_is_never_identical(tmp_path: Path) -> None:
    well, failed = side(tmp_path / "before"), side(tmp_path / "after", 1, "Traceback\nKeyError: 'x'")
    assert of_experiment("flash/tiny", well, well) == IDENTICAL
    assert of_experiment("flash/tiny", well, failed) == "failed after (exit code 1): KeyError: 'x'"
    assert of_experiment("flash/tiny", failed, failed).startswith("failed")


def test_an_experiment_that_one_side_lacks(tmp_path: Path) -> None:
    before, after = side(tmp_path / "before", experiment="a"), side(tmp_path / "after", experiment="b")
    assert of_experiment("b", before, after) == NEW
    assert of_experiment("a", before, after) == "gone: the working tree does not have it"


def test_another_identity_in_full_is_a_difference(tmp_path: Path) -> None:
    before, after = side(tmp_path / "before"), side(tmp_path / "after", said="# run 2")
    assert of_experiment("flash/tiny", before, after) == "fewstep config: # run 1 | # run 2"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two revisions of a program that multiplies; the working tree has a third."""
    root = tmp_path / "repository"
    root.mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for factor in (2, 3):
        (root / "program.py").write_text(PROGRAM.format(factor=factor))
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", f"{factor}"], check=True)
    (root / "program.py").write_text(PROGRAM.format(factor=5))
    (root / "new.py").touch()
    return root


PROGRAM = """
import sys
if "wrong=1" in sys.argv:
    print("error: unknown key 'wrong'; nearest: a")
    sys.exit(2)
print({factor} * int(sys.argv[1]))
"""


def test_both_sides_run_their_own_code(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {}
    with checkouts(repository, "HEAD~1", tmp_path / "sides") as sides:
        assert (sides[1].code / "new.py").exists() and not (sides[0].code / "new.py").exists()
        for each in sides:
            job = {"module": "program", "arguments": ["7", "wrong=1"], "folder": each.code, "log": each.folder / "log"}
            with monkeypatch.context() as patch:
                patch.syspath_prepend(str(each.code))
                assert run(job) == {"code": 0, "dropped": ["wrong"]}
            printed[each.folder.name] = (each.folder / "log").read_text().strip()
    assert printed == {"before": "14", "after": "35"}
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1


def test_an_unknown_revision_is_told_in_one_line(repository: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="revision no-such: .*no-such"),
        checkouts(repository, "no-such", tmp_path / "s"),
    ):
        pass
