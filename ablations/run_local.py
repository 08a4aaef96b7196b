"""Run what a grid lacks on this machine: submitit's local executor with a number of slots. Torch-free.

A cell's job is the ordinary training command in a process of its own: a failed cell stops nobody else. What
is done is not started again, and what was interrupted resumes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ablations.grid import Cell
from ablations.status import Status, status_of, statuses
from ablations.work import ALLOCATOR, job_environment, train_command
from core.run import Run, disk_errors, find_runs

POLL_S = 0.5
PROGRESS_S = 30.0
NO_LIMIT_MIN = 60 * 24 * 365


class LocalRunner:
    """Runs up to ``slots`` cells at a time until every cell is final, has failed, or lacks its parent."""

    def __init__(self, cells: Sequence[Cell], runs_dir: Path, slots: int, say: Callable[[str], None]) -> None:
        self.runs_dir, self.slots, self.say = runs_dir, slots, say
        self.statuses = {item.cell.key: item for item in statuses(cells, runs_dir)}
        self.total = len(self.statuses)
        self._jobs: dict[str, tuple[Any, float]] = {}
        self._failed: set[str] = set()  # ids of runs
        self._told = time.monotonic()
        self._executor: Any = None

    def run(self) -> list[Status]:
        """Run all cells that can run; returns their statuses at the end, in the grid's order."""
        waiting = [item.cell for item in self.statuses.values() if not item.is_final]
        for item in self.statuses.values():
            if item.state == "running":
                self._tell(item.cell, "is being trained by another process; left to it")
        waiting = [cell for cell in waiting if self.statuses[cell.key].state != "running"]
        # References first: the teacher's many steps are often the longest cell, which should not run alone at the end.
        waiting.sort(key=lambda cell: cell.config.method.trains)
        try:
            while waiting or self._jobs:
                waiting = self._start(waiting)
                time.sleep(POLL_S if self._jobs else 0)
                self._finish()
                self._progress()
        except KeyboardInterrupt:
            for job, _ in self._jobs.values():
                job.cancel()
            raise
        return list(self.statuses.values())

    def _start(self, waiting: list[Cell]) -> list[Cell]:
        """Start what may start; returns what still waits. A child of a failed cell is given up."""
        left = []
        for cell in waiting:
            parents = [item for item in self.statuses.values() if item.cell.id in cell.parents]
            if cell.id in self._failed:
                self._tell(cell, "not started: its run has failed")
            elif not self._may_become_final(parents, waiting):
                self._tell(cell, f"not started: its parent {cell.parents[0]} is not done")
            elif self._may_start(cell, parents):
                self._submit(cell)
            else:
                left.append(cell)
        return left

    def _may_become_final(self, parents: Sequence[Status], waiting: Sequence[Cell]) -> bool:
        """Whether all parents are final, or one of them runs or waits."""
        if all(parent.is_final for parent in parents):
            return True
        return any(parent.cell.key in self._jobs or parent.cell in waiting for parent in parents)

    def _may_start(self, cell: Cell, parents: Sequence[Status]) -> bool:
        has_slot = len(self._jobs) < self.slots
        return has_slot and all(parent.is_final for parent in parents) and not self._is_running(cell)

    def _is_running(self, cell: Cell) -> bool:
        """Whether the cell's run is in a job, perhaps to be measured as another cell asks for."""
        return any(self.statuses[key].cell.id == cell.id for key in self._jobs)

    def _submit(self, cell: Cell) -> None:
        from submitit.core.utils import CommandFunction
        from submitit.local.local import LocalExecutor

        if self._executor is None:
            with disk_errors(self.runs_dir):
                self._executor = LocalExecutor(folder=self.runs_dir / ".jobs" / "%j")
            self._executor.update_parameters(timeout_min=NO_LIMIT_MIN)
        threads = max(1, (os.cpu_count() or 1) // self.slots)
        command = train_command(cell, self.runs_dir, threads)
        # The executor hides accelerators from its job; the command gets this process's own environment.
        environment = {**ALLOCATOR, **os.environ, **job_environment(threads)}
        job = self._executor.submit(CommandFunction(command, verbose=False, env=environment))
        self._jobs[cell.key] = (job, time.monotonic())
        self._tell(cell, f"started (log: {job.paths.folder})")

    def _finish(self) -> None:
        for key, (job, started) in list(self._jobs.items()):
            if not job.done():
                continue
            del self._jobs[key]
            cell = self.statuses[key].cell
            error = job.exception()
            path = self._folder(cell)
            now = status_of(cell, path)
            if error is not None and not now.is_final:
                now = Status(cell, "failed", path, now.reason or _last_line(error))
            if not now.is_final:
                self._failed.add(cell.id)
            self.statuses[key] = now
            text = f"{now.state} after {time.monotonic() - started:.0f} s"
            self._tell(cell, f"{text}: {now.reason}" if now.reason else text)

    def _progress(self) -> None:
        """Tell now and then how far the running cells are, from their heartbeats."""
        if not self._jobs or time.monotonic() - self._told < PROGRESS_S:
            return
        self._told = time.monotonic()
        for key in self._jobs:
            cell = self.statuses[key].cell
            path = self._folder(cell)
            text = Run.open(path).progress() if path else ""
            if text:
                self._tell(cell, text)

    def _folder(self, cell: Cell) -> Path | None:
        return next((p for p in find_runs(self.runs_dir) if p.name.rpartition("-")[2] == cell.id), None)

    def _tell(self, cell: Cell, text: str) -> None:
        final = sum(item.is_final for item in self.statuses.values())
        where = f"[{final}/{self.total}]  {cell.name} {cell.id}"
        self.say(f"{time.strftime('%H:%M:%S')}  {where}  {text}")


def _last_line(error: BaseException) -> str:
    """The command's last line on stderr, which submitit puts between its traceback and a ruler."""
    said = str(error).rpartition("FailedJobError: ")[2].partition("\n------")[0]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
