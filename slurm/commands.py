"""``fewstep grid submit|retry|status|cancel``, ``fewstep doctor`` and ``fewstep clean``."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ablations.commands import add_grid_arguments, add_pack_argument, load_grid, print_states
from experiments.parser import add_command

PROFILE = "a profile's name or YAML; default: local"
RUNS_DIR = "where the runs lie; default: runs"


def register(subparsers: Any) -> None:
    """Add this layer's actions to ``fewstep grid``, and its own commands."""
    _register_site(subparsers)
    actions = subparsers.grid_actions
    submit = _on_a_grid(actions, "submit", "submit what is missing to a cluster", run_submit)
    submit.add_argument("--cluster", default="local", metavar="PROFILE", help=PROFILE)
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch files and submit nothing")
    submit.add_argument("--allow-dirty", action="store_true", help="submit uncommitted changes; their patch is kept")
    submit.add_argument("--cells-per-job", type=int, metavar="N", help="runs that share a job and its devices")
    add_pack_argument(submit)
    submit.add_argument("--write", type=Path, metavar="DIR", help="write readable sbatch files; submit nothing")
    submit.set_defaults(again=[])
    retry = _on_a_grid(actions, "retry", "submit again what has failed, was cancelled, or is lost", run_submit)
    retry.add_argument(
        "again", nargs="*", default=[], metavar="CELL|STATE", help="runs, ROW-sSEED, or states; default: all three"
    )
    retry.add_argument("--cluster", default="local", metavar="PROFILE", help=PROFILE)
    retry.add_argument("--allow-dirty", action="store_true", help="submit uncommitted changes; their patch is kept")
    add_pack_argument(retry)
    retry.set_defaults(dry_run=False, cells_per_job=None, write=None)
    status = _on_a_grid(actions, "status", "the state of every cell, on a cluster too", run_status)
    status.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="S", help="again every S seconds (10)")
    cancel = _on_a_grid(actions, "cancel", "cancel the grid's jobs", run_cancel)
    cancel.add_argument("--dry-run", action="store_true", help="print the jobs and cancel nothing")


def _register_site(subparsers: Any) -> None:
    doctor = add_command(subparsers, "doctor", "check a cluster, and say in one line each what to change")
    doctor.add_argument("--cluster", required=True, metavar="PROFILE", help="a profile's name or YAML")
    doctor.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help=RUNS_DIR)
    doctor.set_defaults(run=run_doctor)
    clean = add_command(subparsers, "clean", "free the disk of what nothing needs any more")
    clean.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help=RUNS_DIR)
    cache_dir = "where latents and teacher solutions lie; default: .cache"
    clean.add_argument("--cache-dir", type=Path, default=Path(".cache"), metavar="DIR", help=cache_dir)
    clean.add_argument("--solutions", action="store_true", help="also those that no unfinished run needs")
    clean.add_argument("--dry-run", action="store_true", help="print and remove nothing")
    clean.set_defaults(run=_clean)


def _clean(arguments: argparse.Namespace) -> int:
    from slurm.clean import run_clean

    return run_clean(arguments)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print every finding; exit code 0 when jobs can be submitted, 1 when something must change first."""
    from ablations.snapshot import snapshot
    from slurm.doctor import examine
    from slurm.profile import load

    profile, good = load(arguments.cluster), True
    code = snapshot(profile.shared(arguments.runs_dir), allow_dirty=True)
    for finding in examine(profile, arguments.runs_dir, code):
        print(finding, flush=True)
        good = good and finding.ok is not False
    return 0 if good else 1


def _on_a_grid(actions: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    parser = add_command(actions, name, summary)
    add_grid_arguments(parser).set_defaults(run=run)
    return parser


def run_submit(arguments: argparse.Namespace) -> int:
    from ablations.snapshot import snapshot
    from slurm.profile import load

    profile, grid = load(arguments.cluster), load_grid(arguments)
    cells = grid.expand(arguments.scale, arguments.budget)
    _check_pack(arguments, profile, cells)
    shared = profile.shared(arguments.runs_dir)
    code = snapshot(shared, arguments.allow_dirty or arguments.dry_run, write=not arguments.dry_run)
    if profile.executor != "slurm":
        return _submit_here(arguments, profile, code)
    return _submit(arguments, profile, grid.name, cells, code)


def _check_pack(arguments: argparse.Namespace, profile: Any, cells: list[Any]) -> None:
    """UserError for a number that is out of range, and where each cell has a process or a file of its own."""
    from ablations.packs import check_packs
    from core.schema import UserError

    check_packs(cells, arguments.pack)
    if arguments.pack == 1:
        return
    if arguments.write is not None:
        raise UserError(f"--pack={arguments.pack}: --write makes a file for each cell; leave one of the two out")
    if profile.executor == "debug":
        raise UserError(f"--pack={arguments.pack}: --cluster debug trains one cell after the other; leave --pack out")


def _submit(arguments: argparse.Namespace, profile: Any, name: str, cells: list[Any], code: Path) -> int:
    from ablations.estimate import estimate
    from ablations.work import TRAIN
    from slurm.queue import NoQueue, Queue
    from slurm.status import grid_status
    from slurm.submit import Submitter

    queue = NoQueue() if arguments.dry_run and not Queue().answers() else Queue()
    submitter = Submitter(name, profile, arguments.runs_dir, code, print, queue)
    if arguments.write is not None:
        for file in submitter.write_job_files(cells, arguments.write):
            print(file)
        return 0
    with contextlib.nullcontext() if arguments.dry_run else submitter.ledger.lock():
        again = _named(arguments.again, cells) if arguments.action == "retry" else ()
        missing = submitter.missing(cells, again, adopt=not arguments.dry_run)
        if arguments.action == "retry":
            known = submitter.ledger.jobs()
            missing = [work for work in missing if known.get(work.key) or known.get(work.cell.id)]
        arrays = list(submitter.arrays(missing, cells_per_job=arguments.cells_per_job, pack=arguments.pack))
        training = [work.cell for work in missing if work.kind == TRAIN]
        _print_counts(grid_status(cells, arguments.runs_dir, queue), missing, code)
        if training:
            print(f"training them: {estimate(training, arguments.runs_dir)}")
        if arguments.dry_run:
            _print_arrays(submitter, arrays)
            return 0
        for array in arrays:
            submission = submitter.submit(array)
            print(f"{submission.name}: {array}, job {submission.jobs[0].partition('_')[0]}")
    return 0


def _print_arrays(submitter: Any, arrays: list[Any]) -> None:
    """Print what would be submitted: each array's size, resources, time limit and file."""
    from slurm.queue import NoQueue

    for number, array in enumerate(arrays, 1):
        print(f"array {number}: {array}, each {array.resources} time_min={submitter.profile.time_min}")
        print(submitter.sbatch_text(array))
    jobs = sum(len(array.tasks) for array in arrays)
    print(f"{len(arrays)} arrays with {jobs} jobs would be submitted")
    if isinstance(submitter.queue, NoQueue):
        print("no SLURM answers here: what was submitted before, and the cluster's limits, are not known")


def _print_counts(found: list[Any], missing: list[Any], code: Path) -> None:
    """Print how many cells are in each state, and how many finished runs were made by other code than ``code``."""
    from ablations.snapshot import stale_runs

    counts = _counts(found, {work.cell.id for work in missing})
    stale = stale_runs([status.path for status in found if status.state == "done"], code)
    if stale:
        counts["done"] += f" ({stale} of them with other code)"
    print(f"{len(found)} cells: {', '.join(counts.values())}")


def _counts(found: list[Any], new: set[str]) -> dict[str, str]:
    """``3 done`` by state; the runs of ``new`` are still to be done."""
    counts = Counter("to run" if status.cell.id in new else status.state for status in found)
    return {state: f"{count} {state}" for state, count in counts.items()}


def _submit_here(arguments: argparse.Namespace, profile: Any, code: Path) -> int:
    """On this machine, from the same snapshot: in the background (local), or in this process (debug)."""
    from slurm.local import run_in_background, run_in_process

    words = ["grid", "run", arguments.name, "--scale", arguments.scale, "--budget", arguments.budget]
    words += ["--runs-dir", str(arguments.runs_dir)]
    words += ["--set", *arguments.machine] if arguments.machine else []
    words += ["--slots", str(profile.max_parallel), "--pack", str(arguments.pack)]
    if arguments.dry_run:
        print(f"fewstep {shlex.join(words)}")
        return 0
    if profile.executor == "debug":
        return run_in_process(load_grid(arguments).expand(arguments.scale, arguments.budget), arguments.runs_dir)
    return run_in_background(words, arguments.runs_dir, code)


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
        _print_statuses(cells, arguments.runs_dir, Queue())
        if arguments.watch is None:
            return 0
        time.sleep(arguments.watch)
        print(CLEAR, end="")


CLEAR = "\033[2J\033[H"  # of a terminal


def _print_statuses(cells: list[Any], runs_dir: Path, queue: Any) -> None:
    from slurm.status import grid_status

    found = grid_status(cells, runs_dir, queue)
    on_cluster = any(status.job for status in found)
    heading = ("row", "seed", "run", "state", *(("job", "node", "restarts") if on_cluster else ()), "what")
    rows = [_columns(status, on_cluster) for status in found]
    print_states([heading, *rows], [status.state for status in found])


def _columns(status: Any, on_cluster: bool) -> tuple[str, ...]:
    cell = status.cell
    job = (status.job or "-", status.node or "-", str(status.restarts)) if on_cluster else ()
    what = status.reason or status.progress or str(status.path or "-")
    return (cell.row, str(cell.seed), cell.id, status.state, *job, what)


def run_cancel(arguments: argparse.Namespace) -> int:
    from core.schema import UserError
    from slurm.ledger import Ledger
    from slurm.local import background_pid, cancel_background
    from slurm.queue import Queue

    cells = load_grid(arguments).expand(arguments.scale, arguments.budget)
    newest = Ledger(arguments.runs_dir).newest({cell.id for cell in cells})
    alive = Queue().alive(newest.values())
    if alive and not arguments.dry_run:
        done = subprocess.run(["scancel", *alive], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"scancel: {done.stderr.strip()}")
    what = "to cancel" if arguments.dry_run else "cancelled"
    print(f"{len(alive)} jobs {what}: {' '.join(alive)}".rstrip(": "))
    stop = background_pid if arguments.dry_run else cancel_background
    if stop(arguments.runs_dir):
        print(f"the grid that runs on this machine: {what}")
    return 0
