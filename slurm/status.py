"""The state of every cell of a grid: its run folder, what was submitted, and what SLURM says of it.

planned -> queued -> running -> done | diverged | failed | preempted (saved, waiting to go on) | cancelled | lost (SLURM
does not know the job any more and nothing beats).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablations.grid import Cell
from ablations.status import FINAL, Status, plan
from ablations.work import EVALUATE, TRAIN, Work
from core.run import Run
from slurm.ledger import Ledger
from slurm.queue import JobState, Queue

ENDED_BADLY = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")
TAKEN = (*FINAL, "running", "queued", "preempted")  # nothing to submit
BROKEN = ("failed", "cancelled", "lost")  # submitted again only when asked to
NODE_TO_BLAME = ("FAILED", "NODE_FAIL", "BOOT_FAIL")
LOG_LINES = 5
STALE_S = 90.0


@dataclass(frozen=True)
class CellState:
    """One line of ``fewstep grid status``; ``work`` is what the cell is at, or what comes next."""

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


def grid_states(cells: Sequence[Cell], runs_dir: Path, queue: Queue) -> list[CellState]:
    """Of every distinct cell, in the grid's order; SLURM is asked when one was submitted to it.

    It is asked first: a job that it calls completed has written its results, while what was read before the answer may
    be of a moment when the job had hardly begun.
    """
    ledger = Ledger(runs_dir)
    newest = ledger.newest({cell.id for cell in cells})
    known = queue.states(newest.values()) if newest else {}
    found = [(Work(_at(item), item.cell), item) for item in plan(cells, runs_dir)]
    out = []
    for work, item in found:
        job = newest.get(work.key, "")
        said = known.get(job)
        state, reason = decide(item.state, item.reason, job, said)
        if state == "failed" and reason in ("", "failed"):
            reason = last_lines(ledger.log_of(work.key))
        where = (said.node, said.restarts) if said else ("", 0)
        progress = _progress(item.path) if state == "running" else ""
        out.append(CellState(work, state, job, *where, reason, progress, item.path))
    return out


def _at(item: Status) -> str:
    """Whether the cell's run is to be trained or, trained already, to be measured."""
    return EVALUATE if item.state == "trained" or not item.cell.config.method.trains else TRAIN


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
        return "failed", (reason if run == "failed" else "") or said.state.lower().replace("_", " ")
    if run == "running":
        return run, reason
    return "failed", reason if run == "failed" else ""  # COMPLETED, but other cells of the job: this one has no result


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


def bad_nodes(states: Iterable[JobState], most: int) -> list[str]:
    """Nodes on which more than ``most`` tasks have failed and none has ended well, while others work.

    Where everything fails everywhere the nodes are not to blame.
    """
    failed: Counter[str] = Counter()
    worked: set[str] = set()
    for state in states:
        if state.state == "COMPLETED":
            worked.add(state.node)
        elif state.state in NODE_TO_BLAME and state.node and not set("[,") & set(state.node):  # one node, not several
            failed[state.node] += 1
    bad = {node for node, count in failed.items() if count > most and node not in worked}
    return sorted(bad) if worked - bad else []
