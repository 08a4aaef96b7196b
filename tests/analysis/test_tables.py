"""The table's numbers, best marks, footnote marks and holes."""

from __future__ import annotations

import csv
import dataclasses
import io
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest

from analysis.collect import results
from analysis.columns import column
from analysis.render import FORMATS, render
from analysis.tables import REFERENCE, Entry, Table, build_table


def _entry(table: Table, row: str, metric: str = "kid") -> Entry:
    index = [column.metric for column in table.columns].index(metric)
    lines = [line for block in table.panels[0].blocks for line in block.lines if line.row == row]
    assert len(lines) == 1
    return lines[0].entries[index]


def test_mean_and_spread_over_seeds_in_shown_units(full) -> None:
    entry = _entry(full.table(), "plain")
    assert entry.summary.mean == pytest.approx(5.0) and entry.summary.sd == pytest.approx(1.0)
    assert entry.summary.n == 3 and not entry.marks and not entry.missing


def test_best_follows_the_direction_of_each_metric_and_leaves_references_out(full) -> None:
    table = full.table()
    assert _entry(table, "full").best and not _entry(table, "plain").best  # lower is better
    assert _entry(table, "plain", "clip_score").best and not _entry(table, "full", "clip_score").best
    assert not _entry(table, "teacher").best


def test_missing_seed_is_marked_and_named(world) -> None:
    world.finish({("plain", 0): 0.004, ("plain", 2): 0.006})
    entry = _entry(world.table(), "plain")
    cell = world.cells()["plain", 1]
    assert entry.marks == ("seeds",) and entry.summary.n == 2
    assert entry.missing == (f"{cell.id} (row plain, seed 1): planned",)


def test_diverged_seed_is_marked_and_left_out_of_the_mean(full) -> None:
    run = full.run(full.cells()["plain", 1], "diverged")
    full.measure(run, "kid", 99.0)
    table = full.table()
    entry = _entry(table, "plain")
    assert entry.marks == ("diverged",) and entry.summary.mean == pytest.approx(4.5)
    assert "‡ a seed diverged" in " ".join(table.footnotes)


def test_dirty_commit_is_marked(full) -> None:
    run = full.run(full.cells()["full", 0], dirty=True)
    assert run.path.is_dir()
    table = full.table()
    assert _entry(table, "full").marks == ("dirty",) and not _entry(table, "plain").marks
    assert any("uncommitted" in note for note in table.footnotes)


@pytest.mark.parametrize("format", FORMATS)
def test_hole_names_its_run_in_every_format(world, format) -> None:
    world.finish({("plain", 0): 0.004, ("plain", 1): 0.005, ("plain", 2): 0.006})
    text = render(world.table(), format)
    for seed in (0, 1, 2):
        assert world.cells()["full", seed].id in text
    assert world.cells()["teacher", 0].id in text
    assert world.cells()["plain", 0].id not in text


def test_markdown_and_latex_show_the_numbers(full) -> None:
    table = full.table()
    markdown = render(table, "md")
    assert "| L_distil | 2 | 5.0 ± 1.0 | **0.305 ± 0.001** | 3 |" in markdown
    assert "| Teacher, 50 steps | 100 | 3.6 | 0.304 | 1 |" in markdown
    latex = render(table, "tex")
    assert (
        r"$L_{\mathrm{distil}}$ & 2 & $5.0{\scriptstyle\pm 1.0}$ & $\mathbf{0.305}{\scriptstyle\pm 0.001}$ & 3 \\"
        in latex
    )
    assert r"& seeds \\" in latex and latex.count(r"\begin{tabular}{@{}lrrrr@{}}") == 1
    assert r"\toprule" in latex and "_100" not in latex
    assert "Mean ± standard deviation over 3 training seeds" in markdown
    assert "N = 100 images against 500 real" in markdown


def test_csv_reads_back(full) -> None:
    rows = list(csv.DictReader(io.StringIO(render(full.table(), "csv"))))
    assert len(rows) == (2 + 1) * 2
    line = next(r for r in rows if (r["row"], r["metric"]) == ("plain", "kid"))
    assert (line["mean"], line["sd"], line["seeds"], line["power"], line["best"]) == ("5", "1", "3", "3", "0")


class Balanced(HTMLParser):
    """Every element that needs an end tag has one, in order."""

    VOID = {"br", "input", "meta", "img", "source", "link", "path", "use"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_html_is_balanced_and_shows_mathematics(full) -> None:
    text = render(full.table(), "html")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "<i>L</i><sub>distil</sub> + <i>L</i><sub>DMD</sub>" in text
    assert '5.0<span class="sd"> ± 1.0</span>' in text
    assert "<th>seeds</th></tr>" in text and "<td>3</td></tr>" in text and "<td>1</td></tr>" in text


def test_a_row_of_fewer_seeds_than_others_is_not_best(world) -> None:
    world.finish({("plain", 0): 0.001})  # by chance
    world.finish({("full", 0): 0.004, ("full", 1): 0.005, ("full", 2): 0.006})
    assert not any(_best_rows(world).values()), "one of three seeds leaves nobody to be better than"
    world.finish({("plain", 1): 0.002, ("plain", 2): 0.003})
    assert _best_rows(world) == {"plain": True, "full": False}


def _best_rows(world) -> dict[str, bool]:
    blocks = [block for block in world.table().panels[0].blocks if block.title != REFERENCE]
    return {line.row: line.entries[0].best for line in blocks[0].lines}


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_frame_gives_the_same_text(full, format) -> None:
    assert render(full.table(), format) == render(full.table(), format)


def test_evaluations_rise_from_block_to_block_and_within_the_references(full) -> None:
    layout = dataclasses.replace(full.grid.layout, nfe=[2, 1])
    references = (full.grid.references[0], dataclasses.replace(full.grid.references[0], id="short", label="Short"))
    grid = dataclasses.replace(full.grid, layout=layout, references=references)
    frame = full.frame()
    short = frame[frame["row"] == "teacher"].assign(row="short", nfe=4, steps=2)
    of = dataclasses.replace(full.results(), grid=grid, frame=pd.concat([frame, short], ignore_index=True))
    lines = [(line.label, line.nfe) for block in build_table(of).panels[0].blocks for line in block.lines]
    assert [nfe for _, nfe in lines] == [4, 100, 1, 1, 2, 2] and lines[0][0] == "Short"


def test_a_long_heading_stands_on_two_lines_in_latex() -> None:
    assert column("kd_teacher").tex_heading == (
        r"\shortstack[r]{Kernel distance\\(teacher) $\times$10$^3$ $\downarrow$}"
    )
    assert column("fid").tex_heading == r"FID $\downarrow$"


def test_costs_stand_beside_the_rows_and_not_beside_the_teacher(full) -> None:
    layout = dataclasses.replace(full.grid.layout, costs=["device_hours", "trainable_parameters"])
    grid = dataclasses.replace(full.grid, layout=layout)
    for seed in (0, 1):
        run = full.run(full.cells()["plain", seed])
        run.append_metrics({"attempt": 1, "images": 32, "device_hours": 1.0 + seed, "evaluations": {}})
    run.note(trainable_parameters={"student": 2_000_000, "critic": 500_000})
    table = build_table(results(grid, "tiny", "full", [full.runs]))
    hours, parameters = _entry(table, "plain", "device_hours"), _entry(table, "plain", "trainable_parameters")
    assert hours.summary.mean == 1.5 and hours.marks == ("seeds",) and len(hours.missing) == 1
    assert parameters.summary.mean == 2.5 and parameters.summary.n == 1
    assert _entry(table, "teacher", "device_hours").is_empty
    assert "| Teacher, 50 steps | 100 | 3.6 | 0.304 |  |  | 1 |" in render(table, "md")
    assert "Device-hours: of training" in render(table, "md")


def test_a_table_waits_for_no_library_that_it_does_not_need() -> None:
    """Of SciPy the t distribution alone, which says whether rows can be told apart."""
    code = (
        "import sys; from experiments.cli import main; assert main(['table', 'few_steps']) == 0\n"
        "assert not {'scipy.stats', 'scipy.optimize', 'matplotlib', 'torch'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
