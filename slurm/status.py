"""The status of every cell of a grid: from its run folder, what was submitted, and what SLURM says of it.

planned -> queued -> running -> done | diverged | failed | preempted (saved, waiting to go on) | cancelled | lost (SLURM
does not know the job any more and nothing beats).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablations.grid import Cell
from ablations.logs import last_lines, log_of
from ablations.status import FINAL, progress_of, statuses
from ablations.work import Work, next_work
from slurm.ledger import Ledger
from slurm.queue import JobStatus, Queue

WAITING = ("PENDING", "REQUEUED", "CONFIGURING")
USUAL_REASONS = ("Resources", "Priority", "")
ENDED_BADLY = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")
TAKEN = (*FINAL, "running", "queued", "preempted")  # nothing to submit
BROKEN = ("failed", "cancelled", "lost")  # submitted again only when asked to
NODE_TO_BLAME = ("FAILED", "NODE_FAIL", "BOOT_FAIL")


@dataclass(frozen=True)
class CellStatus:
    """One line of ``fewstep grid status``; ``work`` is what is done for the cell now, or what comes next."""

    work: Work
    state: str
    job: str = ""
    node: str = ""
    restarts: int = 0
    reason: str = ""
    progress: str = ""  # images, speed, time left, as the run's heartbeat tells
    path: Path | None = None

    @property
    def cell(self) -> Cell:
        return self.work.cell


def grid_status(cells: Sequence[Cell], runs_dir: Path, queue: Queue) -> list[CellStatus]:
    """The status of every distinct cell, in the grid's order; SLURM is asked when one was submitted to it.

    It is asked first: a job that it calls completed has written its results, while what was read before the answer may
    be of a moment when the job had hardly begun.
    """
    ledger = Ledger(runs_dir)
    newest = ledger.newest({cell.id for cell in cells})
    known = queue.statuses(newest.values()) if newest else {}
    found = [(next_work(item), item) for item in statuses(cells, runs_dir)]
    out = []
    for work, item in found:
        job = newest.get(work.key, "")
        said = known.get(job)
        state, reason = decide(item.state, item.reason, job, said)
        if state == "failed" and reason in ("", "failed"):
            reason = last_lines(log_of(runs_dir, work.key))
        where = (said.node, said.restarts) if said else ("", 0)
        progress = progress_of(item.path) if state == "running" else ""
        out.append(CellStatus(work, state, job, *where, reason, progress, item.path))
    return out


def decide(run: str, reason: str, job: str, said: JobStatus | None) -> tuple[str, str]:
    """State and reason from the run folder's state, the newest job, and what SLURM says of it."""
    if run in FINAL or not job:
        return run, reason
    if said is None:
        return _decide_unknown(run, reason, job)
    if said.state in WAITING:
        state = "preempted" if said.restarts else "queued"
        return state, "" if said.reason in USUAL_REASONS else said.reason
    if said.alive:
        return "running", ""
    if said.state in ("CANCELLED", "PREEMPTED"):
        return said.state.lower(), ""
    return _decide_ended(run, reason, said)


def _decide_unknown(run: str, reason: str, job: str) -> tuple[str, str]:
    """State and reason of a cell whose job SLURM does not know; a fresh heartbeat means that it runs."""
    if run == "running":
        return run, reason
    return "lost", f"SLURM does not know job {job} any more"


def _decide_ended(run: str, reason: str, said: JobStatus) -> tuple[str, str]:
    """State and reason of a cell whose run is not final although its job has ended."""
    own_reason = reason if run == "failed" else ""
    if said.state in ENDED_BADLY:
        return "failed", own_reason or said.state.lower().replace("_", " ")
    if run == "running":
        return run, reason
    return "failed", own_reason  # COMPLETED, but other cells of the job: this one has no result


def bad_nodes(tasks: Iterable[JobStatus], most: int) -> list[str]:
    """Nodes on which more than ``most`` tasks have failed and none has ended well, while other nodes work.

    Where everything fails everywhere the nodes are not to blame.
    """
    failed: Counter[str] = Counter()
    good: set[str] = set()
    for task in tasks:
        is_one_node = task.node and not set("[,") & set(task.node)
        if task.state == "COMPLETED":
            good.add(task.node)
        elif task.state in NODE_TO_BLAME and is_one_node:
            failed[task.node] += 1
    bad = {node for node, count in failed.items() if count > most and node not in good}
    return sorted(bad) if good else []
