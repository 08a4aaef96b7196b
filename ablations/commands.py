"""Subcommands of the ablations layer: ``fewstep grid list|show|plan|run|logs``; the slurm layer adds submit, ..."""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.completion import completed_by
from experiments.listing import Lines, register_kind
from experiments.parser import add_command

if TYPE_CHECKING:
    from ablations.grid import Cell, Grid
    from ablations.status import Status

LINES, LINES_OF_ALL = 40, 5


def register(subparsers: _SubParsersAction) -> None:
    """Add ``grid`` to the ``fewstep`` command."""
    register_kind("grids", _lines)
    grid = add_command(subparsers, "grid", "declarative ablations: list, show, plan, run, submit, status, ...")
    actions = grid.add_subparsers(dest="action", metavar="ACTION", required=True)
    subparsers.grid_actions = actions  # the slurm layer adds its own
    add_command(actions, "list", "all grids: rows, scales, title and source").set_defaults(run=_list)
    _on_a_grid(actions, "show", "the cells: ids and what sets them apart").set_defaults(run=_show)
    plan = _on_a_grid(actions, "plan", "what `run` would do")
    add_pack_argument(plan).set_defaults(run=_plan)
    run = _on_a_grid(actions, "run", "train and measure what is missing, on this machine")
    run.add_argument("--slots", type=int, default=1, metavar="N", help="cells that run at a time; default: 1")
    add_pack_argument(run).set_defaults(run=_run)
    logs = _on_a_grid(actions, "logs", "the end of the newest log of one cell, or of all")
    logs.add_argument("cell", nargs="?", metavar="CELL", help="a run id, or ROW-sSEED; default: all cells")
    few = f"the last of each log; default: {LINES}, of all cells {LINES_OF_ALL}"
    logs.add_argument("--lines", type=int, metavar="N", help=few)
    logs.set_defaults(run=_logs)


def _on_a_grid(actions: _SubParsersAction, name: str, summary: str) -> ArgumentParser:
    return add_grid_arguments(add_command(actions, name, summary))


def add_grid_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add NAME and ``add_place_arguments``, which every command about one grid takes."""
    completed_by(parser.add_argument("name", metavar="NAME", help="a grid's name, or a YAML file"), _names, "yaml")
    return add_place_arguments(parser)


def add_place_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add scale, budget, and what differs between machines."""
    parser.add_argument("--scale", default="emoji", metavar="SCALE", help="emoji, paper or tiny; default: emoji")
    parser.add_argument("--budget", default="full", metavar="NAME", help="a budget of the grid; default: full")
    runs_dir = "where the runs lie; default: runs"
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help=runs_dir)
    where = "where things lie on this machine, e.g. data.path=/data/shards"
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="machine", help=where)
    return parser


def add_pack_argument(parser: ArgumentParser) -> ArgumentParser:
    """Add how many cells may share a process and a base."""
    most = "cells that train in one process on one frozen base, at most; default: 1"
    parser.add_argument("--pack", type=int, default=1, metavar="N", help=most)
    return parser


def load_grid(arguments: Namespace) -> Grid:
    """The grid that the arguments name."""
    from ablations.grid import load

    return load(arguments.name, arguments.machine)


def _cells(arguments: Namespace) -> list[Cell]:
    return load_grid(arguments).expand(arguments.scale, arguments.budget)


def _names(arguments: Namespace) -> list[str]:
    from ablations.grid import names

    return names()


def _lines() -> Lines:
    from ablations.grid import load, names

    for grid in map(load, names()):
        yield grid.name, f"{grid.title} ({grid.source})" if grid.source else grid.title


def _list(arguments: Namespace) -> int:
    from ablations.grid import load, names

    grids = [load(name) for name in names()]
    rows = [(g.name, f"{len(g.rows)} rows", ", ".join(g.base), g.title, g.source) for g in grids]
    print_columns([("grid", "size", "scales", "title", "source"), *rows])
    return 0


def _show(arguments: Namespace) -> int:
    cells = _cells(arguments)
    common = set.intersection(*(set(cell.overrides) for cell in cells))
    rows = [("row", "seed", "run", "experiment", "differences")]
    for cell in cells:
        rows.append((cell.row, str(cell.seed), cell.id, cell.config.name, _differences(cell, common)))
    print_columns(rows)
    print(f"{len(cells)} cells, {len({cell.id for cell in cells})} runs")
    return 0


def _differences(cell: Cell, common: set[str]) -> str:
    """The overrides that set a cell apart; its seed has a column, and how it is run or measured is left out."""
    hidden = ("seed=", "execution.", "eval.")
    own = [override for override in cell.overrides if override not in common and not override.startswith(hidden)]
    return " ".join(own) or "-"


def _plan(arguments: Namespace) -> int:
    from ablations.estimate import estimate
    from ablations.packs import check_packs, packs_of, saving
    from ablations.status import statuses

    cells = _cells(arguments)
    check_packs(cells, arguments.pack)
    todo = [item for item in statuses(cells, arguments.runs_dir) if not item.is_final]
    verbs = {"trained": "measure", "failed": "resume", "running": "wait for"}
    rows = [(verbs.get(i.state, "train"), i.cell.name, i.cell.id, i.reason) for i in todo]
    print_columns(rows)
    training = [item.cell for item in todo if item.state != "trained"]
    print(f"{len(todo)} runs to do" + (f": {estimate(training, arguments.runs_dir)}" if training else ""))
    if arguments.pack > 1:
        packs = packs_of([cell for cell in training if cell.config.method.trains], arguments.pack)
        for pack in packs:
            print(f"one base: {', '.join(cell.name for cell in pack)}")
        print(saving(packs))
    return 0


def _run(arguments: Namespace) -> int:
    from ablations.packs import check_packs
    from ablations.run_local import LocalRunner
    from ablations.snapshot import local_code
    from ablations.work import job_root
    from core.config import UserError

    if arguments.slots < 1:
        raise UserError(f"--slots={arguments.slots} is out of range; allowed: at least 1")
    cells, say = _cells(arguments), functools.partial(print, flush=True)
    check_packs(cells, arguments.pack)
    runner = LocalRunner(cells, arguments.runs_dir, arguments.slots, say, arguments.pack)
    # The code as it is now: what is edited while a grid runs changes nothing of its later cells.
    ended = runner.run(local_code(job_root(arguments.runs_dir))) if runner.waiting else runner.ended
    _print_statuses(ended)
    return 0 if all(item.is_final for item in ended) else 1


def _logs(arguments: Namespace) -> int:
    from ablations.logs import logs_of, newest_attempt
    from core.schema import check_range

    cells = {cell.key: cell for cell in _chosen(_cells(arguments), arguments.cell)}
    lines = arguments.lines if arguments.lines is not None else LINES if arguments.cell else LINES_OF_ALL
    check_range("--lines", lines, 1)
    for cell in cells.values():
        found = logs_of(cell, arguments.runs_dir)
        if not found:
            print(f"{cell.name} {cell.id}: no log, no job of this cell has started")
        for log in found:
            print(f"==> {cell.name}: {log} <==")
            print("\n".join(newest_attempt(log)[-lines:]))
    return 0


def _chosen(cells: list[Cell], wanted: str | None) -> list[Cell]:
    """The cells of this name or run id; all without one."""
    from core.config import UserError
    from core.schema import nearest

    chosen = [cell for cell in cells if wanted in (None, cell.name, cell.id)]
    if not chosen:
        names = [cell.name for cell in cells]
        raise UserError(f"unknown cell '{wanted}'{nearest(str(wanted), names)}; all: {', '.join(names)}")
    return chosen


def _print_statuses(statuses: list[Status]) -> None:
    rows = [("row", "seed", "run", "state", "where")]
    for item in statuses:
        where = item.reason or (str(item.path) if item.path else "-")
        rows.append((item.cell.row, str(item.cell.seed), item.cell.id, item.state, where))
    print_states(rows, [item.state for item in statuses])


def print_states(rows: list[tuple[str, ...]], states: list[str]) -> None:
    """Print columns, and how many cells are in each state."""
    print_columns(rows)
    print(", ".join(f"{count} {state}" for state, count in Counter(states).items()))


def print_columns(rows: list[tuple[str, ...]]) -> None:
    """Print left-aligned columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
