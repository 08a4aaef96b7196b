"""Copies of the code that jobs run from: made once, whole, of the code alone, and kept while a process uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ablations.snapshot import code_environment, held, is_held, local_code, snapshot
from core.schema import UserError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "core").mkdir(parents=True)
    (root / "core/__init__.py").touch()
    (root / "core/a.py").write_text("a = 1\n")
    (root / ".gitignore").write_text("build\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", root, *words], check=True)
    return root


def test_a_snapshot_is_the_commit_and_stays_when_the_code_changes(checkout: Path, tmp_path: Path) -> None:
    code = snapshot(tmp_path / "shared", root=checkout)
    assert (code / "core/a.py").read_text() == "a = 1\n" and len((code / "COMMIT").read_text().strip()) == 40
    assert snapshot(tmp_path / "shared", root=checkout) == code
    (checkout / "core/a.py").write_text("a = 2\n")
    (checkout / "core/new.py").write_text("b = 1\n")
    with pytest.raises(
        UserError, match=r"uncommitted changes in core/a.py, core/new.py; commit them, or give --allow-dirty"
    ):
        snapshot(tmp_path / "shared", root=checkout)
    dirty = snapshot(tmp_path / "shared", allow_dirty=True, root=checkout)
    assert dirty != code and (dirty / "core/a.py").read_text() == "a = 2\n" and (dirty / "core/new.py").exists()
    assert "+a = 2" in (dirty / "PATCH").read_text() and not (code / "PATCH").exists()
    status = subprocess.run(["git", "-C", checkout, "status", "--porcelain"], capture_output=True, text=True).stdout
    assert status == " M core/a.py\n?? core/new.py\n", "the user's index is as it was"


def test_a_dry_run_writes_nothing(checkout: Path, tmp_path: Path) -> None:
    code = snapshot(tmp_path / "shared", root=checkout, write=False)
    assert not (tmp_path / "shared").exists() and snapshot(tmp_path / "shared", root=checkout) == code


def test_a_snapshot_that_cannot_be_read_is_one_line(checkout: Path, tmp_path: Path) -> None:
    code = snapshot(tmp_path / "shared", root=checkout)
    (code / "COMMIT").unlink()
    with pytest.raises(UserError, match=f"{code} is not a snapshot that can be read; remove it"):
        snapshot(tmp_path / "shared", root=checkout)


def test_what_git_ignores_is_no_change(checkout: Path, tmp_path: Path) -> None:
    (checkout / "core/build").mkdir()
    (checkout / "core/build/big").write_text("x")
    assert not (snapshot(tmp_path / "shared", root=checkout) / "core/build").exists()


def test_no_checkout_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a git checkout"):
        snapshot(tmp_path / "shared", root=tmp_path)


def commit(root: Path) -> None:
    words = ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qam", "more"]
    subprocess.run(["git", "-C", root, *words], check=True)


def test_it_holds_the_code_and_none_of_what_lies_beside_it(checkout: Path, tmp_path: Path) -> None:
    """A user's data may be large, and links may lead out of the checkout."""
    first = snapshot(tmp_path / "shared", root=checkout)
    (checkout / "data").mkdir()
    (checkout / "data/big.tar").write_text("x")
    (checkout / "analysis/records").mkdir(parents=True)
    (checkout / "analysis/records/r.json").write_text("{}")
    (checkout / ".venv").symlink_to("/usr")
    assert snapshot(tmp_path / "shared", root=checkout) == first, "no uncommitted change either"
    (checkout / "core/link").symlink_to("/usr")
    (checkout / "core/a.py").chmod(0o755)
    second = snapshot(tmp_path / "shared", allow_dirty=True, root=checkout)
    assert sorted(path.name for path in second.iterdir()) == ["COMMIT", "PATCH", "core"]
    assert (second / "core/link").is_symlink()


def test_a_commit_of_what_was_run_before_is_told_as_clean(checkout: Path, tmp_path: Path) -> None:
    (checkout / "core/a.py").write_text("a = 3\n")
    dirty = snapshot(tmp_path / "shared", allow_dirty=True, root=checkout)
    commit(checkout)
    clean = snapshot(tmp_path / "shared", root=checkout)
    assert (dirty / "PATCH").exists() and not (clean / "PATCH").exists()
    assert (clean / "COMMIT").read_text() != (dirty / "COMMIT").read_text()


def test_code_that_is_no_checkout_is_run_as_it_is(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot, too, wherever it lies: this one is inside the checkout that it was made of."""
    code = local_code(checkout / "runs", checkout)
    assert code.parent == checkout / "runs/code" and local_code(checkout / "runs", code) == code
    monkeypatch.setenv("PATH", "/nowhere")
    assert local_code(checkout / "runs", checkout) == checkout, "a machine without git"


def test_it_is_kept_while_a_process_that_inherited_it_lives(checkout: Path, tmp_path: Path) -> None:
    code = snapshot(tmp_path / "shared", root=checkout)
    assert not is_held(code)
    with held(code) as descriptors:
        assert is_held(code)
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=descriptors)
    assert is_held(code), "the process that took it may be gone"
    child.communicate()
    assert not is_held(code)


def test_jobs_import_it_in_whatever_folder_they_start(checkout: Path, tmp_path: Path) -> None:
    code = snapshot(tmp_path / "shared", root=checkout)
    (checkout / "core/a.py").write_text("a = 2\n")
    environment = {**os.environ, **code_environment(code)}
    for module in ("import core.a; print(core.a.__file__)", "import sys; print('' in sys.path)"):
        command = [sys.executable, "-c", module]
        said = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.strip() in (str(code / "core/a.py"), "False")
