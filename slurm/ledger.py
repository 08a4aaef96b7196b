"""Submissions in files: an intent is written before sbatch, the job's id after it.

A crash between the two leaves an intent without an id; its job, if there is one, is found by its name, which no other
submission has. So nothing runs twice and nothing is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.work import job_root
from core.run import atomic_write, disk_errors
from core.schema import UserError


@dataclass(frozen=True)
class Submission:
    """One array; ``tasks[i]`` holds the keys of its i-th task's work. ``jobs`` is empty until sbatch has answered."""

    folder: Path
    name: str
    grid: str
    tasks: tuple[tuple[str, ...], ...]
    created: float
    jobs: tuple[str, ...] = ()  # of each task: 123_0, or 123 of a submission of one task, as SLURM calls them
    abandoned: bool = False

    def jobs_of(self, array: str) -> tuple[str, ...]:
        """The ids of the tasks in SLURM, if ``array`` is the id of their array."""
        return (array,) if len(self.tasks) == 1 else tuple(f"{array}_{i}" for i in range(len(self.tasks)))


class Ledger:
    """All submissions of a folder of runs, in ``<runs>/.slurm/``."""

    def __init__(self, runs_dir: Path) -> None:
        self.root = job_root(runs_dir)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other submitters out; the system frees the lock when this process dies."""
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            stream = (self.root / "lock").open("a")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.root}: another submission is under way; wait for it") from None
            yield

    def intend(self, grid: str, kind: str, tasks: Sequence[Sequence[str]], facts: dict[str, Any]) -> Submission:
        """Write down what is about to be submitted."""
        name = f"fewstep-{grid}-{uuid.uuid4().hex[:10]}"
        folder = self.root / "submissions" / name
        record = {"name": name, "grid": grid, "kind": kind, "created": time.time(), **facts}
        record["tasks"] = [list(task) for task in tasks]
        atomic_write(folder / "intent.json", json.dumps(record, indent=1) + "\n")
        return _read(folder)

    def confirm(self, submission: Submission, jobs: Sequence[str]) -> Submission:
        """Write down the ids that SLURM gave to the tasks."""
        assert len(jobs) == len(submission.tasks), (len(jobs), len(submission.tasks))
        atomic_write(submission.folder / "jobs.json", json.dumps({"jobs": list(jobs), "time": time.time()}) + "\n")
        return _read(submission.folder)

    def abandon(self, submission: Submission, reason: str) -> None:
        """Give up an intent that SLURM has never heard of."""
        atomic_write(submission.folder / "abandoned.json", json.dumps({"reason": reason, "time": time.time()}) + "\n")

    def submissions(self) -> list[Submission]:
        """All submissions, oldest first."""
        folders = (file.parent for file in (self.root / "submissions").glob("*/intent.json"))
        return sorted(map(_read, folders), key=lambda submission: submission.created)

    @property
    def job_folder(self) -> Path:
        """The folder of submitit's files and logs, one for all jobs. A folder for each job (%j) would be made after
        sbatch, and a job that starts at once would have no log to open."""
        return self.root / "jobs"

    def newest(self, runs: Collection[str]) -> dict[str, str]:
        """The last job of each training and measurement of these runs, by the key of the work."""
        return {key: entries[-1][1] for key, entries in self.jobs().items() if key.partition("-")[0] in runs}

    def jobs(self) -> dict[str, list[tuple[Submission, str]]]:
        """The submissions of each piece of work, by its key, with the ids of their tasks in SLURM; oldest first."""
        out: dict[str, list[tuple[Submission, str]]] = {}
        for submission in self.submissions():
            for job, keys in zip(submission.jobs, submission.tasks, strict=False):
                for key in keys:
                    out.setdefault(key, []).append((submission, job))
        return out


def _read(folder: Path) -> Submission:
    try:
        record = json.loads((folder / "intent.json").read_text())
        answer = folder / "jobs.json"
        jobs = tuple(json.loads(answer.read_text())["jobs"]) if answer.exists() else ()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: is damaged ({error})") from None
    return Submission(
        folder,
        *(record[key] for key in ("name", "grid")),
        tuple(tuple(task) for task in record["tasks"]),
        record["created"],
        jobs,
        (folder / "abandoned.json").exists(),
    )
