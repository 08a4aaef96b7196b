"""What has been submitted, in files: an intent before sbatch, the job's id after it.

A crash between the two leaves an intent without an id; its job, if there is one, is found by its name, which no other
submission has. So nothing runs twice and nothing is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.run import atomic_write, disk_errors
from core.schema import UserError


@dataclass(frozen=True)
class Submission:
    """One array: ``tasks[i]`` are the run ids of its i-th task. ``jobs`` is empty until sbatch has answered."""

    folder: Path
    name: str
    grid: str
    executor: str  # slurm | local | debug
    tasks: tuple[tuple[str, ...], ...]
    created: float
    jobs: tuple[str, ...] = ()  # of each task: 123_0, or 123 of a submission of one task, as SLURM calls them
    abandoned: bool = False

    def jobs_of(self, array: str) -> tuple[str, ...]:
        """The tasks' ids in the array of this id."""
        return (array,) if len(self.tasks) == 1 else tuple(f"{array}_{i}" for i in range(len(self.tasks)))


class Ledger:
    """``<runs>/.slurm/``."""

    def __init__(self, runs_dir: Path) -> None:
        self.root = Path(runs_dir).resolve() / ".slurm"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One submitter at a time; the system frees it when that process dies."""
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            stream = (self.root / "lock").open("a")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.root}: another submission is under way; wait for it") from None
            yield

    def intend(self, grid: str, executor: str, tasks: Sequence[Sequence[str]], facts: dict[str, Any]) -> Submission:
        """Write down what is about to be submitted."""
        name = f"fewstep-{grid}-{uuid.uuid4().hex[:10]}"
        folder = self.root / "submissions" / name
        record = {"name": name, "grid": grid, "executor": executor, "created": time.time(), **facts}
        record["tasks"] = [list(task) for task in tasks]
        atomic_write(folder / "intent.json", json.dumps(record, indent=1) + "\n")
        return _read(folder)

    def confirm(self, submission: Submission, jobs: Sequence[str]) -> Submission:
        """Write down the ids that SLURM gave to the tasks."""
        assert len(jobs) == len(submission.tasks), (len(jobs), len(submission.tasks))
        atomic_write(submission.folder / "jobs.json", json.dumps({"jobs": list(jobs), "time": time.time()}) + "\n")
        return _read(submission.folder)

    def abandon(self, submission: Submission, reason: str) -> None:
        """An intent that SLURM has never heard of."""
        atomic_write(submission.folder / "abandoned.json", json.dumps({"reason": reason, "time": time.time()}) + "\n")

    def submissions(self) -> list[Submission]:
        """All of them, oldest first."""
        folders = (file.parent for file in (self.root / "submissions").glob("*/intent.json"))
        return sorted(map(_read, folders), key=lambda submission: submission.created)

    def jobs(self) -> dict[str, list[tuple[Submission, str]]]:
        """By run id: its submissions with their task's SLURM id, oldest first."""
        out: dict[str, list[tuple[Submission, str]]] = {}
        for submission in self.submissions():
            for job, runs in zip(submission.jobs, submission.tasks, strict=False):
                for run in runs:
                    out.setdefault(run, []).append((submission, job))
        return out


def _read(folder: Path) -> Submission:
    try:
        record = json.loads((folder / "intent.json").read_text())
        answer = folder / "jobs.json"
        jobs = tuple(json.loads(answer.read_text())["jobs"]) if answer.exists() else ()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: is damaged ({error})") from None
    tasks = tuple(tuple(task) for task in record["tasks"])
    abandoned = (folder / "abandoned.json").exists()
    return Submission(
        folder, record["name"], record["grid"], record["executor"], tasks, record["created"], jobs, abandoned
    )
