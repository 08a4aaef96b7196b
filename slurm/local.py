"""The same submission without a cluster: a grid runs on this machine, in the background or in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ablations.grid import Cell
from ablations.snapshot import code_environment, held
from ablations.status import statuses
from ablations.work import train_command
from core.schema import UserError
from slurm.ledger import Ledger

PID_FILE, LOG_FILE = "local.pid", "local.log"


def run_in_background(words: Sequence[str], runs_dir: Path, code: Path) -> int:
    """Start ``fewstep WORDS`` from the snapshot ``code``, detached from this terminal; one at a time for a folder."""
    root = Ledger(runs_dir).root
    pid = background_pid(runs_dir)
    if pid is not None:
        raise UserError(f"pid {pid} is running a grid in {runs_dir} already; wait for it, or: fewstep grid cancel NAME")
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOG_FILE).open("a") as log, held(code) as descriptors:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} fewstep {' '.join(words)}\n")
        log.flush()
        started = subprocess.Popen(
            [sys.executable, "-m", "experiments.cli", *words],
            env={**os.environ, **code_environment(code)},
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (root / PID_FILE).write_text(f"{started.pid}\n")
    print(f"pid {started.pid}; log: {root / LOG_FILE}")
    return 0


def background_pid(runs_dir: Path) -> int | None:
    """The process that runs a grid in the background; None when there is none."""
    try:
        pid = int((Ledger(runs_dir).root / PID_FILE).read_text())
    except (OSError, ValueError):
        return None
    asked = subprocess.run(["ps", "-o", "stat=,command=", "-p", str(pid)], capture_output=True, text=True).stdout
    return pid if "experiments.cli grid run" in asked and not asked.startswith("Z") else None


def cancel_background(runs_dir: Path) -> int | None:
    """Stop the grid in the background and its trainings, which save their state; its pid, or None when none ran.

    Not by an interrupt: what a script starts in the background ignores those, the grid too, which would go on with the
    next cells.
    """
    pid = background_pid(runs_dir)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)  # it leads a group of its own
    return pid


def run_in_process(cells: Sequence[Cell], runs_dir: Path) -> int:
    """Train one cell after the other inside this process, for a debugger; an error is raised as it is."""
    from experiments.cli import main

    for item in statuses(cells, runs_dir):
        if item.is_final:
            continue
        _, _, _, *words = train_command(item.cell, runs_dir, os.cpu_count() or 1)
        code = main(["train", *words])
        if code:
            return code
    return 0
