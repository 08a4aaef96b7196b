"""``fewstep table|figure|report|records NAME``, ``fewstep report RUN``, ``fewstep claims`` and ``fewstep results``."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.commands import add_grid_arguments, add_place_arguments, load_grid
from experiments.completion import completed_by, run_ids
from experiments.parser import add_command

if TYPE_CHECKING:
    from analysis.collect import Results


def register(subparsers: Any) -> None:
    """Add this layer's subcommands."""
    table = _command(subparsers, "table", run_table, "print a grid's table from its runs")
    formats = ("md", "csv", "tex", "html")
    table.add_argument("--format", choices=formats, default="md", help="Markdown, CSV, LaTeX or HTML; default: md")
    table.add_argument("--out", type=Path, help="file to write instead of printing")
    figure = _command(subparsers, "figure", run_figure, "draw a grid's figure (PNG, PDF and its caption)")
    figure.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    _register_report(subparsers)
    records = _command(subparsers, "records", run_records, "keep the small files of a grid's runs for committing")
    records.add_argument("--out", type=Path, help="folder to write to (default: analysis/records/runs)")
    claims = add_command(subparsers, "claims", "judge the papers' claims from the runs of their grids")
    add_place_arguments(claims).add_argument(
        "names", nargs="*", default=[], metavar="GRID", help="default: every grid with claims"
    )
    claims.add_argument("--out", type=Path, help="Markdown file to write instead of printing")
    claims.set_defaults(run=run_claims)
    summary = "how many seeds a grid's claims need, from the spread of committed records"
    power = add_command(subparsers, "plan-power", summary)
    add_grid_arguments(power).set_defaults(run=run_plan_power)
    everything = add_command(subparsers, "results", "rebuild every table and figure from runs and committed records")
    everything.add_argument("--runs-dir", type=Path, metavar="DIR", help="run folders to read besides the records")
    everything.add_argument("--out", type=Path, default=Path("out/results"), help="folder; default: out/results")
    everything.add_argument("--pages", action="store_true", help="only the pages of analysis/ (RESULTS.md, papers/)")
    everything.set_defaults(run=run_results)


def _register_report(subparsers: Any) -> None:
    summary = "write the HTML page of a run, or of a grid with its table and figure"
    report = add_command(subparsers, "report", summary)
    name = report.add_argument("name", metavar="NAME|RUN", help="a grid's name or YAML file; a run's folder or id")
    completed_by(name, _grids_and_runs, "yaml")
    add_place_arguments(report).set_defaults(run=run_report)
    report.add_argument("--out", type=Path, default=Path("out"), help="folder or .html file (default: out)")
    report.add_argument("--follow", action="store_true", help="write a run's page again and again while it trains")


def _grids_and_runs(arguments: argparse.Namespace) -> list[str]:
    from ablations.grid import names

    return [*names(), *run_ids(arguments)]


def _command(subparsers: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = add_command(subparsers, name, summary)
    add_grid_arguments(parser).set_defaults(run=run)
    return parser


def _results(arguments: argparse.Namespace) -> Iterator[Results]:
    """At the budget asked for, then at the grid's others; from run folders and committed records."""
    grid = load_grid(arguments)
    from analysis.collect import RECORDS, results

    for budget in dict.fromkeys([arguments.budget, *grid.budgets]):
        yield results(grid, arguments.scale, budget, [arguments.runs_dir, RECORDS])


def _stem(of: Results) -> str:
    return f"{of.grid.name}-{of.scale}-{of.budget}"


def run_table(arguments: argparse.Namespace) -> int:
    return _give(_table(next(_results(arguments)), arguments.format), arguments.out)


def _give(text: str, out: Path | None) -> int:
    """Print ``text``, or write it to ``out`` and print where it is."""
    from core.run import atomic_write

    if out is None:
        print(text, end="")
    else:
        atomic_write(out, text)
        print(out)
    return 0


def _table(of: Results, format: str) -> str:
    from analysis.render import render
    from analysis.tables import build_table

    return render(build_table(of), format)


def run_figure(arguments: argparse.Namespace) -> int:
    _draw(next(_results(arguments)), arguments.out)
    return 0


def _draw(of: Results, folder: Path) -> None:
    from analysis.figures import caption, grid_figure
    from analysis.looks import encode
    from core.run import atomic_write

    figure = grid_figure(of.grid, of.frame)
    for format in ("png", "pdf"):
        path = folder / f"{_stem(of)}.{format}"
        atomic_write(path, encode(figure, format))
        print(path)
    atomic_write(folder / f"{_stem(of)}.txt", caption(of.grid, of.frame) + "\n")


def run_report(arguments: argparse.Namespace) -> int:
    """The page of a run; of a grid also its table and figure, in one process: most of each command's time is imports
    and expanding the grid."""
    if _is_run(arguments.name):
        return _report_run(arguments)
    budgets = list(_results(arguments))
    from analysis.report import build_report
    from core.run import atomic_write

    folder, path = _places(arguments.out, _stem(budgets[0]))
    print(_table(budgets[0], "md"))
    _draw(budgets[0], folder)
    atomic_write(path, build_report(budgets))
    _tell(path)
    return 0


def _is_run(name: str) -> bool:
    """Whether ``name`` is a run's folder, or looks like a run's id."""
    return (Path(name) / "config.yaml").is_file() or re.fullmatch("[0-9a-f]{10}", name) is not None


def _report_run(arguments: argparse.Namespace) -> int:
    from core.run import Run

    run = Run.open(arguments.name, arguments.runs_dir)
    from analysis.run_report import REFRESH_S, write_report

    _, path = _places(arguments.out, f"run-{run.id}")
    is_training = write_report(run, path)
    _tell(path)
    while arguments.follow and is_training:
        time.sleep(REFRESH_S)
        is_training = write_report(run, path)
    return 0


def _places(out: Path, stem: str) -> tuple[Path, Path]:
    """The folder, and the page's file in it, that ``--out`` means."""
    return (out.parent, out) if out.suffix == ".html" else (out, out / f"{stem}.html")


def _tell(path: Path) -> None:
    print(f"{path}  (open it in a browser: {path.resolve().as_uri()})", flush=True)


def run_claims(arguments: argparse.Namespace) -> int:
    from ablations.grid import load, names
    from core.schema import check_choice

    for name in arguments.names:
        check_choice("GRID", name, names())
    from analysis.claims import load_claims
    from analysis.collect import RECORDS, results
    from analysis.render import claims_markdown
    from analysis.verdicts import judge, with_rates

    known = tuple(dict.fromkeys(claim.grid for claim in load_claims()))
    for name in arguments.names:
        check_choice("GRID", name, known)
    judgements = []
    for name in arguments.names or known:
        grid = load(name, arguments.machine)
        of = results(grid, arguments.scale, arguments.budget, [arguments.runs_dir, RECORDS])
        judgements += judge(of)
    return _give(claims_markdown(with_rates(judgements)), arguments.out)


def run_plan_power(arguments: argparse.Namespace) -> int:
    of = next(_results(arguments))
    from analysis.plan_power import markdown
    from analysis.spread import BUDGET, SCALE
    from core.schema import UserError

    if (of.scale, of.budget) != (SCALE, BUDGET):
        raise UserError(
            f"the spread of seeds is known at --scale {SCALE} --budget {BUDGET} alone (analysis/spread.csv)"
        )
    print(markdown(of), end="")
    return 0


def run_results(arguments: argparse.Namespace) -> int:
    """Result pages hold committed records alone: with ``--runs-dir`` they stay as they are."""
    from analysis.pages import FOLDER
    from analysis.results import write_pages, write_results
    from core.schema import UserError

    if arguments.pages and arguments.runs_dir is not None:
        raise UserError("--pages are written from committed records alone; leave --runs-dir out")
    pages = FOLDER if arguments.runs_dir is None else None
    written = write_pages() if arguments.pages else write_results(arguments.out, arguments.runs_dir, pages)
    for path in written:
        print(path)
    return 0


def run_records(arguments: argparse.Namespace) -> int:
    grid = load_grid(arguments)
    from analysis.collect import RECORDS, cell_runs
    from analysis.keep_records import save_records
    from analysis.manifest import seal

    folder = arguments.out or RECORDS
    items = cell_runs(grid, arguments.scale, arguments.budget, [arguments.runs_dir])
    saved = save_records(items, folder)
    if folder == RECORDS:
        seal()
    size = sum(file.stat().st_size for path in saved for file in path.rglob("*") if file.is_file())
    print(f"{len(saved)} of {len(items)} runs kept in {folder} ({size / 1e6:.2f} MB)")
    return 0
