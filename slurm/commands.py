"""``fewstep grid submit|cancel|logs`` and the cluster's part of ``status``."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from ablations.commands import add_grid_arguments, load_grid, print_columns


def register(subparsers: Any) -> None:
    """Add this layer's actions to ``fewstep grid``."""
    actions = subparsers.grid_actions
    submit = _on_a_grid(actions, "submit", "submit what is missing to a cluster", run_submit)
    submit.add_argument(
        "--cluster", default="local", metavar="PROFILE", help="a profile's name or YAML; default: local"
    )
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch files and submit nothing")
    submit.add_argument("--allow-dirty", action="store_true", help="submit uncommitted changes; their patch is kept")
    submit.add_argument("--cells-per-job", type=int, metavar="N", help="runs that share a job and its devices")
    queue = _on_a_grid(actions, "queue", "the state of every cell, on the cluster too", run_queue)
    queue.add_argument("--cluster", default="slurm", choices=("slurm", "local"), help="default: slurm")
    cancel = _on_a_grid(actions, "cancel", "cancel the grid's jobs", run_cancel)
    cancel.add_argument("--dry-run", action="store_true", help="print the jobs and cancel nothing")
    logs = _on_a_grid(actions, "logs", "the end of a cell's log", run_logs)
    logs.add_argument("cell", metavar="CELL", help="a run id, or ROW-sSEED")
    logs.add_argument("--lines", type=int, default=40, metavar="N")


def _on_a_grid(actions: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    add_grid_arguments(parser).set_defaults(run=run)
    return parser


def run_submit(arguments: argparse.Namespace) -> int:
    from slurm.profile import load
    from slurm.snapshot import snapshot
    from slurm.submit import Submitter

    profile, grid = load(arguments.cluster), load_grid(arguments)
    cells = grid.expand(arguments.scale, arguments.budget)
    shared = Path(profile.shared_dir or arguments.runs_dir / ".slurm").resolve()
    code = snapshot(shared, arguments.allow_dirty or arguments.dry_run)
    submitter = Submitter(grid.name, profile, arguments.runs_dir, code, print)
    with submitter.ledger.lock():
        missing = submitter.missing(cells)
        arrays = list(submitter.arrays(missing, cells_per_job=arguments.cells_per_job))
        for array in arrays:
            if arguments.dry_run:
                print(submitter.sbatch_text(array))
                continue
            submission = submitter.submit(array)
            count = sum(len(task) for task in array.tasks)
            print(f"{submission.name}: {count} cells in {len(array.tasks)} tasks, job {submission.jobs[0]}")
    taken = len({cell.id for cell in cells}) - len({cell.id for cell in missing})
    print(f"{len(missing)} cells to run, {taken} done, at work or queued already")
    return 0


def run_queue(arguments: argparse.Namespace) -> int:
    from slurm.queue import Queue
    from slurm.status import grid_states

    cells = load_grid(arguments).expand(arguments.scale, arguments.budget)
    states = grid_states(cells, arguments.runs_dir, Queue() if arguments.cluster == "slurm" else None)
    rows = [("row", "seed", "run", "state", "job", "node", "restarts", "what")]
    for s in states:
        what = s.reason or s.progress or (str(s.path) if s.path else "-")
        rows.append((s.cell.row, str(s.cell.seed), s.cell.id, s.state, s.job or "-", s.node or "-",
                     str(s.restarts), what))  # fmt: skip
    print_columns(rows)
    return 0


def run_cancel(arguments: argparse.Namespace) -> int:
    from core.schema import UserError
    from slurm.ledger import Ledger
    from slurm.queue import Queue

    cells = load_grid(arguments).expand(arguments.scale, arguments.budget)
    jobs = Ledger(arguments.runs_dir).jobs()
    newest = [jobs[cell.id][-1][1] for cell in cells if cell.id in jobs]
    alive = [task for task, state in Queue().states(newest).items() if state.alive and task in newest]
    if alive and not arguments.dry_run:
        done = subprocess.run(["scancel", *alive], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"scancel: {done.stderr.strip()}")
    print(f"{len(alive)} jobs {'to cancel' if arguments.dry_run else 'cancelled'}: {' '.join(alive)}".rstrip(": "))
    return 0


def run_logs(arguments: argparse.Namespace) -> int:
    from core.schema import UserError
    from slurm.ledger import Ledger

    cells = load_grid(arguments).expand(arguments.scale, arguments.budget)
    names = {f"{cell.row}-s{cell.seed}": cell.id for cell in cells}
    run = names.get(arguments.cell, arguments.cell)
    if run not in names.values():
        raise UserError(f"unknown cell '{arguments.cell}'; all: {', '.join(names)}")
    log = Ledger(arguments.runs_dir).root / "logs" / f"{run}.log"
    if not log.exists():
        raise UserError(f"{log}: no job of this cell has started")
    print("\n".join(log.read_text(errors="replace").splitlines()[-arguments.lines :]))
    return 0
