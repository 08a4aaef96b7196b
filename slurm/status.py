"""The state of every cell of a grid: its run folder, what was submitted, and what SLURM says of it.

planned -> queued -> running -> done | diverged | failed | preempted (saved, waiting to go on) | cancelled | lost (SLURM
does not know the job any more and nothing beats).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ablations.grid import Cell
from ablations.status import FINAL, plan
from core.run import Run
from slurm.ledger import Ledger
from slurm.queue import JobState, Queue

ENDED_BADLY = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")
TAKEN = (*FINAL, "running", "queued", "preempted")  # nothing to submit
BROKEN = ("failed", "cancelled", "lost")  # submitted again only when asked to
LOG_LINES = 5
STALE_S = 90.0


@dataclass(frozen=True)
class CellState:
    """One line of ``fewstep grid status``."""

    cell: Cell
    state: str
    job: str = ""
    node: str = ""
    restarts: int = 0
    reason: str = ""
    progress: str = ""  # images, speed, time left, as the run's heartbeat tells
    path: Path | None = None


def grid_states(cells: Sequence[Cell], runs_dir: Path, queue: Queue) -> list[CellState]:
    """Of every distinct cell, in the grid's order; SLURM is asked when one was submitted to it."""
    ledger = Ledger(runs_dir)
    last = {run: entries[-1] for run, entries in ledger.jobs().items()}
    newest = {run: job for run, (submission, job) in last.items() if submission.executor == "slurm"}
    wanted = [newest[cell.id] for cell in cells if cell.id in newest]
    known = queue.states(wanted) if wanted else {}
    out = []
    for item in plan(cells, runs_dir):
        job = newest.get(item.cell.id, "")
        state, reason = decide(item.state, item.reason, job, known.get(job))
        if state == "failed" and reason in ("", "failed"):
            reason = last_lines(ledger.root / "logs" / f"{item.cell.id}.log")
        found = known.get(job)
        out.append(
            CellState(
                item.cell, state, job, found.node if found else "", found.restarts if found else 0, reason,
                _progress(item.path) if state == "running" else "", item.path,
            )
        )  # fmt: skip
    return out


def decide(run: str, reason: str, job: str, said: JobState | None) -> tuple[str, str]:
    """State and reason from the run folder's state, the newest job, and what SLURM says of it."""
    if run in FINAL or not job:
        return run, reason
    if said is None:
        return ("running", reason) if run == "running" else ("lost", f"SLURM does not know job {job} any more")
    if said.state in ("PENDING", "REQUEUED", "CONFIGURING"):
        waiting = said.reason if said.reason not in ("Resources", "Priority", "") else ""
        return ("preempted" if said.restarts else "queued"), waiting
    if said.alive:
        return "running", ""
    if said.state == "CANCELLED":
        return "cancelled", ""
    if said.state == "PREEMPTED":
        return "preempted", ""
    if said.state in ENDED_BADLY:
        return "failed", reason or said.state.lower().replace("_", " ")
    return run, reason  # COMPLETED: the folder has the last word


def _progress(path: Path | None) -> str:
    """What the run told last; with its age when that is old."""
    run = Run.open(path) if path else None
    beat = run.last_heartbeat() if run else None
    if run is None or beat is None:
        return ""
    age = time.time() - beat["time"]
    return run.progress() + (f"  ({age:.0f} s ago)" if age > STALE_S else "")


def last_lines(log: Path, count: int = LOG_LINES) -> str:
    """The end of a cell's log in one line."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return " | ".join(lines[-count:])
