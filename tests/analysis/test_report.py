"""The report opens from disk alone and shows what it must; the commands write it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analysis.collect import results
from analysis.report import build_report
from experiments.cli import main
from tests.analysis.test_tables import Balanced


@pytest.fixture
def page(full, sheet) -> str:
    run = full.run(full.cells()["full", 0])
    evaluations = {"teacher": 1234, "student": 99}
    for images in (16, 32):
        line = {"attempt": 1, "iteration": 1, "images": images, "evaluations": evaluations, "seconds": 1.0}
        run.append_metrics(line | {"device_hours": 0.25, "student/distil": 0.5})
    sheet(run, 32)
    full.finish({("plain", 0): 0.008, ("full", 0): 0.007}, "demo")
    return build_report([results(full.grid, "tiny", budget, [full.runs]) for budget in ("demo", "full")])


def test_nothing_is_loaded_from_elsewhere(page) -> None:
    assert not re.search(r"<(script|link|iframe)\b", page)
    assert all(uri.startswith(("data:image/webp;base64,", "#")) for uri in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "url(http" not in page and "@import" not in page


def test_page_is_balanced(page) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


def test_both_budgets_figures_samples_costs_and_provenance_are_there(page, full) -> None:
    assert "Demo budget, 1 seed" in page and "Full budget, 3 seeds" in page
    assert page.count("<svg") == 3  # a figure for each budget, and the curves of the one that logged
    assert page.count('src="data:image/webp') == 1 and "after 32 images" in page
    assert "<td>1,234</td>" in page and "<td>0.25</td>" in page and "abc123" in page
    assert "The term lowers FID" in page
    for cell in full.cells().values():
        assert f"<code>{cell.id}</code>" in page


def test_budget_without_numbers_is_left_out(full) -> None:
    page = build_report([results(full.grid, "tiny", budget, [full.runs]) for budget in ("full", "demo")])
    assert "Demo budget" not in page and "Full budget" in page


def test_commands(full, tmp_path: Path, capsys) -> None:
    options = [str(tmp_path / "influence.yaml"), "--scale", "tiny", "--runs-dir", str(full.runs)]
    assert main(["table", *options]) == 0
    assert "| Teacher, 50 steps | 100 | 3.6 |" in capsys.readouterr().out
    assert main(["table", *options, "--format", "tex", "--out", str(tmp_path / "t.tex")]) == 0
    assert r"\bottomrule" in (tmp_path / "t.tex").read_text()
    assert main(["figure", *options]) == 0
    for suffix in ("png", "pdf", "txt"):
        assert (tmp_path / "out" / f"influence-tiny-full.{suffix}").stat().st_size > 100
    (tmp_path / "out" / "influence-tiny-full.png").unlink()
    assert main(["report", *options]) == 0
    assert "| Teacher, 50 steps | 100 | 3.6 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "influence-tiny-full.png").stat().st_size > 100
    assert (tmp_path / "out" / "influence-tiny-full.html").read_text().startswith("<!doctype html>")
    capsys.readouterr()
    assert main(["records", *options, "--out", str(tmp_path / "kept")]) == 0
    assert "7 of 7 runs kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table", "no_such_grid"], "unknown grid 'no_such_grid'"),
        (["report", "flash_losses", "--scale", "huge"], "base has no scale 'huge'"),
        (
            ["figure", "flash_losses", "--scale", "tiny", "--budget", "tenfold"],
            "budget=tenfold is unknown; allowed: full, demo",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")


def test_nothing_has_been_run_yet(world) -> None:
    page = build_report([results(world.grid, "tiny", budget, [world.runs]) for budget in ("full", "demo")])
    assert "No run has been evaluated yet." in page and page.count("<svg") == 1
    for cell in world.cells().values():
        assert f"missing {cell.id}" in page or f"{cell.id} (row" in page
