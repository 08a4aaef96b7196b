"""Run what a grid lacks on this machine, in a number of slots. Torch-free.

A cell's job is the ordinary training command in a process of its own: a failed cell stops nobody else, and none stops
because this process was killed. What is done is not started again, what was interrupted resumes, and what another
process is at (one that an earlier, killed grid has left, or a grid beside this one) is waited for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ablations.grid import Cell
from ablations.job import start
from ablations.logs import last_lines, log_of
from ablations.packs import companions, pack_of
from ablations.snapshot import ROOT, code_environment, held
from ablations.status import DIVERGED, Status, progress_of, status_of, statuses
from ablations.work import ALLOCATOR, TRAIN, job_environment, next_work, train_command, train_words
from core.run import Run, disk_errors, find_runs

POLL_S = 0.5
PROGRESS_S = 30.0
LEAVE_S = 2.0  # a Ctrl-C at the terminal reaches the trainings too, which need no second signal


@dataclass(frozen=True)
class _Job:
    """A process and its log; the cells that it trains have logs of their own."""

    child: subprocess.Popen
    log: Path
    started: float = field(default_factory=time.monotonic)


class LocalRunner:
    """Runs up to ``slots`` jobs at a time until every cell is final, has failed, or lacks its parent.

    A job trains one cell, or up to ``pack`` of them on one base.
    """

    def __init__(
        self, cells: Sequence[Cell], runs_dir: Path, slots: int, say: Callable[[str], None], pack: int = 1
    ) -> None:
        self.runs_dir, self.slots, self.say, self.pack = runs_dir, slots, say, pack
        self.statuses = {item.cell.key: item for item in statuses(cells, runs_dir)}
        self.total = len(self.statuses)
        self.waiting = [item.cell for item in self.statuses.values() if not item.is_final]
        # References first: the teacher's many steps are often the longest cell, which should not run alone at the end.
        self.waiting.sort(key=lambda cell: cell.config.method.trains)
        self._jobs: dict[str, _Job] = {}  # by the key of each of its cells
        self._others: dict[str, bool] = {}  # runs that another process is at: whether one of this machine
        self._failed: set[str] = set()  # ids of runs
        self._told = time.monotonic()

    def run(self, code: Path = ROOT) -> list[Status]:
        """Run all cells that can run from ``code``; returns their statuses at the end, in the grid's order."""
        with held(code) as descriptors:
            try:
                for item in [item for item in self.statuses.values() if item.state == "running"]:
                    self._look(item.cell)
                while self.waiting or self._jobs:
                    self._start(code, descriptors)
                    time.sleep(POLL_S if self._jobs or self._others else 0)
                    self._finish()
                    self._look_at_others()
                    self._progress()
            except KeyboardInterrupt:
                self._leave()
                raise
        return self.ended

    @property
    def ended(self) -> list[Status]:
        """The status of every distinct cell, in the grid's order."""
        return list(self.statuses.values())

    def _start(self, code: Path, descriptors: Sequence[int]) -> None:
        """Start what may start. A child of a failed cell is given up, and what another process has done is done."""
        left = []
        for cell in self.waiting:
            parents = self._parents(cell)
            if cell.key in self._jobs:
                continue  # beside one that came before it
            if cell.id in self._others:
                left.append(cell)
            elif cell.id in self._failed:
                self._tell(cell, "not started: its run has failed")
            elif any(parent.state == DIVERGED for parent in parents):
                self._tell(cell, f"not started: its parent {cell.parents[0]} has diverged")
            elif not self._may_become_final(parents):
                self._tell(cell, f"not started: its parent {cell.parents[0]} is not done")
            elif not self._may_start(cell, parents) or self._look(cell).state == "running":
                left.append(cell)
            elif not self.statuses[cell.key].is_final:
                self._submit([cell, *self._companions(cell)], code, descriptors)
        self.waiting = left

    def _parents(self, cell: Cell) -> list[Status]:
        return [item for item in self.statuses.values() if item.cell.id in cell.parents]

    def _companions(self, first: Cell) -> list[Cell]:
        """The cells that are trained with ``first``; those that are only to be measured wait for a job of their own."""
        if self.pack == 1 or next_work(self.statuses[first.key]).kind != TRAIN:
            return []
        ready = [cell for cell in self.waiting if cell.id != first.id and self._may_join(cell)]
        return companions(first, ready, self.pack - 1)

    def _may_join(self, cell: Cell) -> bool:
        taken = {*self._others, *self._failed}
        if cell.id in taken or self._is_running(cell) or not all(item.is_final for item in self._parents(cell)):
            return False
        now = self._look(cell)
        return now.state not in ("running", "trained") and not now.is_final

    def _may_become_final(self, parents: Sequence[Status]) -> bool:
        """Whether all parents are final, or one of them runs or waits."""
        if all(parent.is_final for parent in parents):
            return True
        return any(parent.cell.key in self._jobs or parent.cell in self.waiting for parent in parents)

    def _may_start(self, cell: Cell, parents: Sequence[Status]) -> bool:
        has_slot = len(self._children) + sum(self._others.values()) < self.slots
        return has_slot and all(parent.is_final for parent in parents) and not self._is_running(cell)

    def _is_running(self, cell: Cell) -> bool:
        """Whether the cell's run is in a job, perhaps to be measured as another cell asks for."""
        return any(self.statuses[key].cell.id == cell.id for key in self._jobs)

    def _look(self, cell: Cell) -> Status:
        """The cell's status as it is now; a run that is at work is another process's, and noted as such."""
        now = self.statuses[cell.key] = status_of(cell, self._folder(cell))
        if now.state == "running" and cell.id not in self._others:
            assert now.path is not None
            self._others[cell.id] = Run.open(now.path).noted("host") in (None, socket.gethostname())
            self._tell(cell, "is being trained by another process; waiting for it")
        return now

    def _look_at_others(self) -> None:
        """Let go of the runs that no other process is at any more; what is still to be done of them waits."""
        for cell in [item.cell for item in self.statuses.values()]:
            if cell.id in self._others and (now := self._look(cell)).state != "running":
                del self._others[cell.id]
                self._tell(cell, f"the other process has left it {now.state}")

    @property
    def _children(self) -> list[subprocess.Popen]:
        """The processes at work, each once."""
        return list({job.child.pid: job.child for job in self._jobs.values()}.values())

    def _submit(self, cells: Sequence[Cell], code: Path, descriptors: Sequence[int]) -> None:
        threads = max(1, (os.cpu_count() or 1) // self.slots)
        logs = [log_of(self.runs_dir, next_work(self.statuses[cell.key]).key) for cell in cells]
        if len(cells) == 1:
            command, log = train_command(cells[0], self.runs_dir, threads), logs[0]
        else:
            words = [train_words(cell, self.runs_dir, threads) for cell in cells]
            command, log = pack_of(words, logs, self.runs_dir)
        environment = {**ALLOCATOR, **os.environ, **job_environment(threads), **code_environment(code)}
        with disk_errors(log):
            job = _Job(start(log, command, environment, descriptors), log)
        for cell, own in zip(cells, logs, strict=True):
            self._jobs[cell.key] = job
            beside = f", with {len(cells) - 1} others on one base" if len(cells) > 1 else ""
            self._tell(cell, f"started (log: {own}){beside}")

    def _finish(self) -> None:
        for key, job in list(self._jobs.items()):
            if job.child.poll() is None:
                continue
            del self._jobs[key]
            log = log_of(self.runs_dir, next_work(self.statuses[key]).key)
            now = self._look(self.statuses[key].cell)
            if now.state == "running":  # another process was faster
                self.waiting.append(now.cell)
                continue
            has_failed = job.child.returncode or now.state == "planned"  # of a pack others may have ended well
            if has_failed and not now.is_final:
                reason = now.reason or last_lines(log, 1) or last_lines(job.log, 1)
                now = Status(now.cell, "failed", now.path, reason)
            if not now.is_final:
                self._failed.add(now.cell.id)
            self.statuses[key] = now
            text = f"{now.state} after {time.monotonic() - job.started:.0f} s"
            self._tell(now.cell, f"{text}: {now.reason}" if now.reason else text)

    def _leave(self) -> None:
        """Tell the trainings to save their state and leave, and wait for them."""
        end = time.monotonic() + LEAVE_S
        children = self._children
        while any(child.poll() is None for child in children) and time.monotonic() < end:
            time.sleep(POLL_S)
        for child in children:
            child.terminate()
        for child in children:
            child.wait()

    def _progress(self) -> None:
        """Tell now and then how far the running cells are, from their heartbeats."""
        if time.monotonic() - self._told < PROGRESS_S:
            return
        self._told = time.monotonic()
        others = [cell for cell in self.waiting if cell.id in self._others]
        for cell in [*(self.statuses[key].cell for key in self._jobs), *others]:
            text = progress_of(self._folder(cell))
            if text:
                self._tell(cell, text)

    def _folder(self, cell: Cell) -> Path | None:
        return next((p for p in find_runs(self.runs_dir) if p.name.rpartition("-")[2] == cell.id), None)

    def _tell(self, cell: Cell, text: str) -> None:
        final = sum(item.is_final for item in self.statuses.values())
        where = f"[{final}/{self.total}]  {cell.name} {cell.id}"
        self.say(f"{time.strftime('%H:%M:%S')}  {where}  {text}")
