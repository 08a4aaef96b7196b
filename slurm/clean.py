"""``fewstep clean``: give disk space back. A run can still be resumed, used and tabulated. Torch-free.

Kept: everything of a run that is not finished; of a finished one all but the state that only a resume would read. With
``--solutions`` also teacher solutions that no unfinished run asks for (they can be solved again).
"""

from __future__ import annotations

import json
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from ablations.estimate import size_text
from ablations.snapshot import is_held
from ablations.status import FINAL
from core.config import ExperimentConfig
from core.identity import teacher_problem
from core.run import Run, disk_errors, find_runs
from slurm.ledger import Ledger, Submission
from slurm.queue import Queue

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")  # as atomic writes call what they have not finished
STALE_S = 24 * 3600.0  # a temporary file this old was left by a process that is gone


def superfluous(runs_dir: Path, cache_dir: Path, *, solutions: bool = False) -> Iterator[tuple[Path, str]]:
    """Yield (path, why it can go) for everything that no running or waiting job reads."""
    unfinished = []
    for path in find_runs(runs_dir):
        run = Run.open(path)
        if run.state() not in FINAL:
            unfinished.append(run.config)
        elif (path / "state").is_dir():
            yield path / "state", "only a resume reads it, and the run is done"
    for folder in (runs_dir, cache_dir):
        for path in folder.rglob(".*.*"):
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > STALE_S:
                yield path, "left by an interrupted write"
    yield from _submissions(runs_dir)
    if solutions:
        yield from _solutions(cache_dir / "solutions", unfinished)


def _submissions(runs_dir: Path) -> Iterator[tuple[Path, str]]:
    """Code snapshots and job files that no waiting or running job reads, on a cluster or on this machine."""
    ledger = Ledger(runs_dir)
    alive = _alive([submission for submission in ledger.submissions() if submission.jobs])
    yield from _snapshots(ledger, alive)
    if not alive:
        for file in sorted(ledger.job_folder.glob("*")):
            yield file, "its job has ended"


def _snapshots(ledger: Ledger, alive: list[Submission]) -> Iterator[tuple[Path, str]]:
    used = {json.loads((submission.folder / "intent.json").read_text()).get("code") for submission in alive}
    for folder in sorted((ledger.root / "code").glob("*")):
        if str(folder) not in used and not is_held(folder):
            yield folder, "no job runs from this code"


def _alive(submissions: list[Submission]) -> list[Submission]:
    """Submissions of which a job waits or runs."""
    jobs = set(Queue().alive(job for submission in submissions for job in submission.jobs))
    return [submission for submission in submissions if jobs.intersection(submission.jobs)]


def _solutions(root: Path, unfinished: list[ExperimentConfig]) -> Iterator[tuple[Path, str]]:
    """Stores whose problems no unfinished run poses."""
    posed = [problem for config in unfinished if (problem := teacher_problem(config)) is not None]
    for file in sorted(root.glob("*/key.json")):
        key = json.loads(file.read_text())
        if not any(problem.items() <= key.items() for problem in map(_comparable, posed)):
            yield file.parent, "no unfinished run asks for these solutions"


def _comparable(problem: dict) -> dict:
    return json.loads(json.dumps(problem))


def size_of(path: Path) -> int:
    """Bytes on disk; a sparse file counts what it takes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(512 * file.lstat().st_blocks for file in files)


def run_clean(arguments: Namespace) -> int:
    """Print what can go, with sizes; remove it unless it is a dry run."""
    total = 0
    for path, why in superfluous(arguments.runs_dir, arguments.cache_dir, solutions=arguments.solutions):
        size = size_of(path)
        total += size
        print(f"{size_text(size):>8}  {path}  ({why})")
        if not arguments.dry_run:
            with disk_errors(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{size_text(total)} {'can be freed' if arguments.dry_run else 'freed'}")
    return 0
