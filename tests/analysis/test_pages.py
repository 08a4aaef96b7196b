"""Result pages: committed pages are what the records give, and prose gets the numbers that the tables show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ablations.grid import load
from analysis.artefacts.context import Context
from analysis.collect import RECORDS, results
from analysis.facts import Facts
from analysis.pages import FOLDER, INDEX, PAGES, build_pages
from analysis.render import render
from analysis.spread import FILE
from analysis.tables import build_table
from core.catalogue import METRICS, READINGS, REPORTED
from core.schema import UserError
from experiments.cli import main


@pytest.fixture(scope="module")
def context() -> Context:
    """The committed records, read once."""
    return Context((RECORDS,))


@pytest.fixture(scope="module")
def pages(context: Context) -> dict[str, str]:
    return dict(build_pages(context))


@pytest.fixture
def facts(full) -> Facts:
    """A grid whose kernel distances are known: plain 4, 6, 5, full 3.1, 4.9, 4.0, and the teacher's 3.6."""
    context = Context((full.runs,))
    context.__dict__["grids"] = {"influence": full.results()}
    return Facts(context)


def test_the_committed_spread_is_what_the_records_give(context: Context) -> None:
    assert context.spread == FILE.read_text(), "write it again with `fewstep results --pages`"


def test_committed_pages_are_what_the_records_give(pages: dict[str, str]) -> None:
    assert pages.keys() == {page.file for page in PAGES} | {INDEX}
    stale = [name for name, text in pages.items() if (FOLDER / name).read_text(encoding="utf-8") != text]
    assert stale == [], "write them again with `fewstep results --pages`"


def test_every_grid_is_shown_on_one_page(context: Context, pages: dict[str, str]) -> None:
    named = [name for page in PAGES for name in page.grids]
    assert sorted(named) == sorted(context.grids)
    facts = Facts(context)
    for page in PAGES:
        for name in page.grids:
            assert f"### {facts.title(name)}\n" in pages[page.file], name


@pytest.mark.parametrize("format", ["md", "tex", "html"])
def test_readers_get_words_instead_of_ids(context: Context, format: str) -> None:
    ids = [name for name in (*METRICS, *READINGS, *REPORTED) if "_" in name]
    words = re.compile("|".join([*ids, r"\bheldout\b", r"protocol train", r"\| train \|", r"\bKD\b", r"\bFD\b"]))
    tables = [*context.tables.values(), build_table(results(load("few_steps"), "paper", "full", []))]
    found = {table.name: words.findall(render(table, format).replace("\\_", "_")) for table in tables}
    assert {name: ids for name, ids in found.items() if ids} == {}


def test_prose_shows_a_number_as_the_table_does(facts: Facts) -> None:
    assert facts.value("influence", "full", "kid") == "4.0 ± 0.9"
    assert facts.value("influence", "teacher", "kid") == "3.6"
    assert "| **4.0 ± 0.9** |" in facts.table("influence")


def test_gaps_are_closed_with_an_interval(facts: Facts) -> None:
    """full closes 1 of the 1.4 from plain to the teacher; from the teacher to plain, both ends but one are measured."""
    closed = facts.closed("influence", "full", ("plain", "teacher"), "kid", "train")
    assert closed == "71% (the gap may be nothing)"  # 1.4 with an error of 0.58 and two degrees of freedom
    assert facts.closed("influence", "plain", ("full", "teacher"), "kid", "train").startswith("none")


def test_a_gap_between_known_ends_has_the_interval_of_the_row(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    """(9 - 4) / (9 - 3) with the row's error 0.9018 / sqrt(3) over 6, t = 4.3027."""
    known = {"start": {0: 9.0}, "goal": {0: 3.0}, "row": {0: 3.1, 1: 4.9, 2: 4.0}}
    monkeypatch.setattr(Facts, "_raw", lambda self, name, row, *place: known[row])
    assert facts.closed("influence", "row", ("start", "goal"), "kid", "train") == "83% [46, 121]"


def test_rows_are_compared_at_the_same_seeds(facts: Facts) -> None:
    assert facts.change("influence", "full", "plain", "kid", "train") == "−20.0%"
    assert facts.seeds_lower("influence", "full", "plain", "kid", "train") == "3 of 3"
    assert facts.seeds_lower("influence", "plain", "full", "kid", "train") == "0 of 3"
    assert facts.difference("term").startswith("−1.00 [−1.2")


def test_logs_count_in_their_second_half(full, facts: Facts) -> None:
    for seed in (0, 1, 2):
        run = full.run(full.cells()["plain", seed])
        for value in (9.0, 9.0, 1.0, 3.0 + seed):
            line = {"attempt": 1, "images": 32, "device_hours": 0.5, "evaluations": {"teacher": 3000, "student": 1400}}
            run.append_metrics(line | {"student/loss": value})
    assert facts.logged("influence", "plain", "student/loss", 1) == "2.5"
    assert facts.evaluations("influence", "plain") == "4,000"
    assert facts.num_trainings(["influence"]) == "6"
    assert facts.hours(["influence"]) == "1.5"


def test_a_verdict_stands_with_the_difference_that_decided_it(facts: Facts) -> None:
    line = facts.verdicts(["influence"]).splitlines()[-1]
    assert line.startswith("| The term lowers FID | reproduced: KID −1.00 [−1.2") and line.endswith("] |")
    assert facts.tally(["influence"]) == "1 reproduced"


@pytest.mark.parametrize(
    ("name", "row", "metric", "allowed"),
    [
        ("influenza", "full", "kid", "influence"),
        ("influence", "fool", "kid", "full"),
        ("influence", "full", "fid", "kid"),
    ],
)
def test_a_wrong_name_in_a_template_is_said(facts: Facts, name: str, row: str, metric: str, allowed: str) -> None:
    with pytest.raises(UserError, match=allowed):
        facts.value(name, row, metric)


def test_a_number_that_nobody_has_measured_is_no_number(world) -> None:
    context = Context((world.runs,))
    context.__dict__["grids"] = {"influence": world.results()}
    with pytest.raises(UserError, match="row full has no kid on train captions"):
        Facts(context).value("influence", "full", "kid")


def test_pages_hold_committed_records_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "--pages", "--runs-dir", str(tmp_path)]) == 2
    assert "--runs-dir" in capsys.readouterr().err
