"""Jobs run from a copy of the code as it was when they were asked for: editing goes on while they wait.

``<shared>/code/<digest>/`` is staged under a temporary name and renamed, so that it is whole or not there. For a
cluster an uncommitted change is refused unless it is allowed; it is part of the copy and kept as a patch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.run import Run, atomic_folder, disk_errors
from core.schema import UserError

ROOT = Path(__file__).resolve().parents[1]
# What jobs import and read; a user's own files beside it, perhaps large, are no part of it.
CODE = ("core", "experiments", "ablations", "analysis", "slurm")
RECORDS = ":!analysis/records"  # most of the files, and no job reads them
MARK = "COMMIT"  # the commit; its lock is held while a process runs from the copy


@dataclass(frozen=True)
class _Index:
    """git's list of the code as it is now, in an index of its own: the user's is not touched."""

    root: Path
    file: Path

    @property
    def paths(self) -> list[str]:
        return ["--", *(name for name in CODE if (self.root / name).exists()), RECORDS]

    def git(self, *words: str, stdin: bytes | None = None) -> bytes:
        environment = {**os.environ, "GIT_INDEX_FILE": str(self.file)}
        return _git(self.root, *words, environment=environment, stdin=stdin) or b""


def local_code(shared: Path, root: Path = ROOT) -> Path:
    """The code that jobs of this machine run from: a snapshot, or ``root`` where it is no checkout of git's."""
    return snapshot(shared, allow_dirty=True, root=root) if is_checkout(root) else root


def is_checkout(root: Path) -> bool:
    """Whether git knows ``root`` and lets this user read it."""
    return (root / ".git").exists() and _git(root, "rev-parse", "HEAD", check=False) is not None


def snapshot(shared: Path, allow_dirty: bool = False, root: Path = ROOT, *, write: bool = True) -> Path:
    """The folder that holds the code as it is now; it is made if it is missing, unless ``write`` is false."""
    if not is_checkout(root):
        raise UserError(f"{root} is not a git checkout; jobs run from a snapshot of a commit")
    with _index(root) as index:
        patch = index.git("diff", "--cached", "--binary", "HEAD", *index.paths)
        if patch and not allow_dirty:
            raise UserError(_uncommitted(index))
        commit = index.git("rev-parse", "HEAD").decode().strip()
        listed = index.git("ls-files", "--stage", *index.paths)
        folder = shared / "code" / hashlib.blake2b(commit.encode() + listed, digest_size=8).hexdigest()
        if folder.exists() and not os.access(folder / MARK, os.R_OK):
            raise UserError(f"{folder} is not a snapshot that can be read; remove it, and submit again")
        if write and not folder.exists():
            _write(index, folder, commit, patch)
    return folder


@contextlib.contextmanager
def held(code: Path) -> Iterator[tuple[int, ...]]:
    """Keep a snapshot from being cleaned; a process that inherits the descriptors keeps it as long as it lives."""
    try:
        stream = (code / MARK).open()
    except OSError:  # no snapshot
        yield ()
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield (stream.fileno(),)


def is_held(code: Path) -> bool:
    """Whether a process of this machine runs from the snapshot."""
    try:
        with (code / MARK).open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def code_environment(code: Path) -> dict[str, str]:
    """Variables that let a process import ``code`` whatever folder it starts in, be it a checkout of the same."""
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(code), *([others] if others else [])]), "PYTHONSAFEPATH": "1"}


def stale_runs(paths: Sequence[Path], code: Path) -> int:
    """How many of the runs at ``paths`` were made by another commit than that of the snapshot ``code``."""
    try:
        commit = (code / MARK).read_text().strip()
    except OSError:  # a dry run has made no snapshot
        commit = (_git(ROOT, "rev-parse", "HEAD") or b"").decode().strip()
    return sum(Run.open(path).provenance()["commit"] != commit for path in paths)


@contextlib.contextmanager
def _index(root: Path) -> Iterator[_Index]:
    """All files that git does not ignore, as they are now; what the user's index knows of them is not read again."""
    with disk_errors(root), tempfile.TemporaryDirectory() as folder:
        index = _Index(root, Path(folder) / "index")
        own = root / (_git(root, "rev-parse", "--git-path", "index") or b"").decode().strip()
        if own.exists():
            shutil.copy2(own, index.file)  # with its time: git reads again what has changed since
        index.git("read-tree", "--reset", "HEAD")
        index.git("add", "--all", *index.paths)
        yield index


def _write(index: _Index, folder: Path, commit: str, patch: bytes) -> None:
    with atomic_folder(folder) as staged:
        names = index.git("ls-files", "-z", *index.paths)
        try:
            index.git("checkout-index", "-z", "--stdin", f"--prefix={staged}/", stdin=names)
        except UserError as error:
            raise UserError(f"cannot write {folder}: {str(error).splitlines()[-1]}") from None
        (staged / MARK).write_text(f"{commit}\n")
        if patch:
            (staged / "PATCH").write_bytes(patch)


def _uncommitted(index: _Index) -> str:
    changed = index.git("diff", "--cached", "--name-only", "HEAD", *index.paths).decode().splitlines()
    some = f"{', '.join(changed[:3])}{' ...' * (len(changed) > 3)}"
    return f"uncommitted changes in {some}; commit them, or give --allow-dirty"


def _git(
    root: Path,
    *words: str,
    check: bool = True,
    environment: dict[str, str] | None = None,
    stdin: bytes | None = None,
) -> bytes | None:
    """Output of git; None when it fails or is not on this machine, which is a UserError with ``check``."""
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=120, input=stdin)
    except FileNotFoundError:
        done = subprocess.CompletedProcess(command, 127, b"", b"is not on this machine")
    if done.returncode == 0:
        return done.stdout
    if check:
        said = done.stderr.decode(errors="replace").strip() or signal.strsignal(-done.returncode)
        raise UserError(f"git {words[0]}: {said}")
    return None
