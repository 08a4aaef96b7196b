"""``fewstep grid submit|retry|status|cancel|logs``."""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path
from typing import Any

from ablations.commands import add_grid_arguments, load_grid, print_states


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
    submit.set_defaults(again=[])
    retry = _on_a_grid(actions, "retry", "submit again what has failed, was cancelled, or is lost", run_submit)
    retry.add_argument("again", nargs="*", metavar="CELL|STATE", help="runs, ROW-sSEED, or states; default: all three")
    retry.add_argument("--cluster", default="local", metavar="PROFILE", help="default: local")
    retry.add_argument("--allow-dirty", action="store_true", help="submit uncommitted changes; their patch is kept")
    retry.set_defaults(dry_run=False, cells_per_job=None)
    status = _on_a_grid(actions, "status", "the state of every cell, on a cluster too", run_status)
    status.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="S", help="again every S seconds (10)")
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
    code = snapshot(shared, arguments.allow_dirty or arguments.dry_run, write=not arguments.dry_run)
    submitter = Submitter(grid.name, profile, arguments.runs_dir, code, print)
    with submitter.ledger.lock():
        missing = submitter.missing(cells, _named(arguments.again, cells) if arguments.action == "retry" else ())
        if arguments.action == "retry":
            missing = [cell for cell in missing if submitter.ledger.jobs().get(cell.id)]
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


def _named(words: list[str], cells: list[Any]) -> list[str]:
    """Run ids and states that the words mean; UserError for a word that means nothing."""
    from core.schema import check_choice
    from slurm.status import BROKEN

    names = {cell.name: cell.id for cell in cells}
    for word in words:
        check_choice("retry", word, (*BROKEN, *names, *names.values()))
    return [names.get(word, word) for word in words] or list(BROKEN)


def run_status(arguments: argparse.Namespace) -> int:
    from slurm.queue import Queue

    cells = load_grid(arguments).expand(arguments.scale, arguments.budget)
    while True:
        _print_states(cells, arguments.runs_dir, Queue())
        if arguments.watch is None:
            return 0
        time.sleep(arguments.watch)
        print(CLEAR, end="")


CLEAR = "\033[2J\033[H"  # of a terminal


def _print_states(cells: list[Any], runs_dir: Path, queue: Any) -> None:
    from slurm.status import grid_states

    states = grid_states(cells, runs_dir, queue)
    on_cluster = any(state.job for state in states)
    where = ("job", "node", "restarts") if on_cluster else ()
    rows = [("row", "seed", "run", "state", *where, "what")]
    for s in states:
        what = s.reason or s.progress or (str(s.path) if s.path else "-")
        cluster = (s.job or "-", s.node or "-", str(s.restarts)) if on_cluster else ()
        rows.append((s.cell.row, str(s.cell.seed), s.cell.id, s.state, *cluster, what))
    print_states(rows, [s.state for s in states])


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
    names = {cell.name: cell.id for cell in cells}
    run = names.get(arguments.cell, arguments.cell)
    if run not in names.values():
        raise UserError(f"unknown cell '{arguments.cell}'; all: {', '.join(names)}")
    log = Ledger(arguments.runs_dir).root / "logs" / f"{run}.log"
    if not log.exists():
        raise UserError(f"{log}: no job of this cell has started")
    print("\n".join(log.read_text(errors="replace").splitlines()[-arguments.lines :]))
    return 0
