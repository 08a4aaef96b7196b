"""Jobs run from a copy of the code at the commit they were submitted from: editing goes on while they wait.

``<shared>/code/<tree hash>/`` is staged under a temporary name and renamed, so that it is whole or not there. An
uncommitted change is refused unless it is allowed, and is then part of the tree and kept as a patch.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.run import Run, atomic_folder, disk_errors
from core.schema import UserError

ROOT = Path(__file__).resolve().parents[1]


def snapshot(shared: Path, allow_dirty: bool = False, root: Path = ROOT, *, write: bool = True) -> Path:
    """The folder that holds the code as it is now; it is made if it is missing, unless ``write`` is false."""
    if _git(root, "rev-parse", "--git-dir", check=False) is None:
        raise UserError(f"{root} is not a git checkout; jobs run from a snapshot of a commit")
    tree, patch = _tree(root)
    if patch and not allow_dirty:
        changed = (_git(root, "status", "--porcelain") or b"").decode().split()[1::2]
        raise UserError(
            f"uncommitted changes in {', '.join(changed[:3])}{' ...' * (len(changed) > 3)}; commit them, "
            "or give --allow-dirty"
        )
    folder = shared / "code" / tree[:16]
    if folder.exists() and not os.access(folder / "COMMIT", os.R_OK):
        raise UserError(f"{folder} is not a snapshot that can be read; remove it, and submit again")
    if write and not folder.exists():
        archive = _git(root, "archive", "--format=tar", tree)
        assert archive is not None
        with atomic_folder(folder) as staged:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(staged, filter="data")
            commit = (_git(root, "rev-parse", "HEAD") or b"").decode().strip()
            (staged / "COMMIT").write_text(f"{commit}\n")
            if patch:
                (staged / "PATCH").write_bytes(patch)
    return folder


def stale_runs(paths: Sequence[Path], code: Path) -> int:
    """How many of the runs at ``paths`` were made by another commit than that of the snapshot ``code``."""
    try:
        commit = (code / "COMMIT").read_text().strip()
    except OSError:  # a dry run has made no snapshot
        commit = (_git(ROOT, "rev-parse", "HEAD") or b"").decode().strip()
    return sum(Run.open(path).provenance()["commit"] != commit for path in paths)


def _tree(root: Path) -> tuple[str, bytes]:
    """The tree of all files that git does not ignore, as they are now, and their difference from the commit.

    Written through an index of its own: the user's is not touched.
    """
    with disk_errors(root), tempfile.TemporaryDirectory() as folder:
        index = {**os.environ, "GIT_INDEX_FILE": str(Path(folder) / "index")}
        _git(root, "read-tree", "HEAD", environment=index)
        _git(root, "add", "--all", environment=index)
        patch = _git(root, "diff", "--cached", "--binary", "HEAD", environment=index) or b""
        return (_git(root, "write-tree", environment=index) or b"").decode().strip(), patch


def _git(root: Path, *words: str, check: bool = True, environment: dict[str, str] | None = None) -> bytes | None:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, env=environment, timeout=120)
    if done.returncode:
        if check:
            raise UserError(f"git {words[0]}: {done.stderr.decode(errors='replace').strip()}")
        return None
    return done.stdout
