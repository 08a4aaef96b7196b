"""``fewstep table|figure|report|records NAME``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.commands import add_grid_arguments, load_grid

if TYPE_CHECKING:
    import pandas as pd

    from ablations.grid import Grid


def register(subparsers: Any) -> None:
    """Add this layer's subcommands."""
    table = _command(subparsers, "table", run_table, "print a grid's table from its runs")
    table.add_argument("--format", choices=("md", "csv", "tex", "html"), default="md")
    table.add_argument("--out", type=Path, help="file to write instead of printing")
    figure = _command(subparsers, "figure", run_figure, "draw a grid's figure (PNG, PDF and its caption)")
    figure.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    report = _command(subparsers, "report", run_report, "write a grid's self-contained HTML report")
    report.add_argument("--out", type=Path, default=Path("out"), help="folder or .html file (default: out)")
    records = _command(subparsers, "records", run_records, "keep the small files of a grid's runs for committing")
    records.add_argument("--out", type=Path, help="folder to write to (default: analysis/records)")


def _command(subparsers: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    add_grid_arguments(parser).set_defaults(run=run)
    return parser


def _load(arguments: argparse.Namespace) -> tuple[Grid, list[Path]]:
    """The grid, and where its runs may lie: run folders and committed records."""
    from analysis.collect import RECORDS

    grid = load_grid(arguments)
    return grid, [arguments.runs_dir, RECORDS]


def _frame(arguments: argparse.Namespace) -> tuple[Grid, pd.DataFrame]:
    from analysis.collect import cell_runs, collect

    grid, sources = _load(arguments)
    items = cell_runs(grid, arguments.scale, arguments.budget, sources)
    return grid, collect(grid, items, arguments.scale, arguments.budget)


def _stem(grid: Grid, arguments: argparse.Namespace) -> str:
    return f"{grid.name}-{arguments.scale}-{arguments.budget}"


def run_table(arguments: argparse.Namespace) -> int:
    from analysis.render import render
    from analysis.tables import build_table
    from core.run import atomic_write

    text = render(build_table(*_frame(arguments)), arguments.format)
    if arguments.out is None:
        print(text, end="")
    else:
        atomic_write(arguments.out, text)
        print(arguments.out)
    return 0


def run_figure(arguments: argparse.Namespace) -> int:
    from analysis.figures import caption, encode, grid_figure
    from core.run import atomic_write

    grid, frame = _frame(arguments)
    figure = grid_figure(grid, frame)
    for format in ("png", "pdf"):
        path = arguments.out / f"{_stem(grid, arguments)}.{format}"
        atomic_write(path, encode(figure, format))
        print(path)
    atomic_write(arguments.out / f"{_stem(grid, arguments)}.txt", caption(grid, frame) + "\n")
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    from analysis.report import build_report
    from core.run import atomic_write

    grid, sources = _load(arguments)
    path = arguments.out if arguments.out.suffix == ".html" else arguments.out / f"{_stem(grid, arguments)}.html"
    budgets = [arguments.budget, *(name for name in grid.budgets if name != arguments.budget)]
    atomic_write(path, build_report(grid, arguments.scale, budgets, sources))
    print(f"{path}  (open it in a browser: {path.resolve().as_uri()})")
    return 0


def run_records(arguments: argparse.Namespace) -> int:
    from analysis.collect import RECORDS, cell_runs
    from analysis.records import save_records

    grid, _ = _load(arguments)
    folder = arguments.out or RECORDS
    items = cell_runs(grid, arguments.scale, arguments.budget, [arguments.runs_dir])
    saved = save_records(items, folder)
    size = sum(file.stat().st_size for path in saved for file in path.rglob("*") if file.is_file())
    print(f"{len(saved)} of {len(items)} runs kept in {folder} ({size / 1e6:.2f} MB)")
    return 0
