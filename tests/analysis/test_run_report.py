"""The page of one run: what it shows while it trains and afterwards, in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.log_curves import log_curves
from analysis.run_report import build_run_report, duration, write_report
from core.run import Run
from experiments.cli import main
from tests.analysis.test_tables import Balanced

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BUDGET = 32
ROLES = {"teacher": 1234, "student": 99}
COLOUR = (250, 0, 250)


def log_line(images: int, loss: float) -> dict[str, object]:
    line = {"attempt": 1, "iteration": images // 4, "images": images, "student_images": images, "evaluations": ROLES}
    return line | {"seconds": 10.0 * images, "device_hours": images / 360, "images_per_s": 3.5, "student/distill": loss}


@pytest.fixture
def run(world) -> Run:
    """Half trained and nobody at work on it, with one sheet and one number at a quarter."""
    run = world.run(world.cells()["full", 0], state="stopped")
    for images, loss in ((4, 1.0), (8, 0.1), (16, 0.001)):
        run.append_metrics(log_line(images, loss))
    (run.path / "samples").mkdir()
    Image.new("RGB", (400, 300), COLOUR).save(run.path / "samples" / "0000000008.png")
    world.measure(run, "kid", 0.00425, images=8)
    (run.path / "log.txt").write_text("first\nlast <line>\n")
    return run


def texts(page: str) -> str:
    """The page without its tags, and one space between words."""
    return re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL))


def test_a_run_that_trains_shows_how_far_it_is_and_loads_itself_again(run: Run) -> None:
    assert run.config.train.budget.amount == BUDGET
    with run.lock():
        run.begin_attempt()
        page = build_run_report(Run.open(run.path))
        said = texts(page)
        assert '<meta http-equiv="refresh" content="30">' in page and "state running" in said
        assert "interrupted" not in said and "50%" in said and "16 of 32 images" in said
        assert "time left about 3 min" in said, "as long as the first half of 160 s"
        run.heartbeat({"images": 16, "eta_s": 30 * 3600})
        assert re.search(r"time left about (30 h 0|29 h 59|29 h 60) min", texts(build_run_report(Run.open(run.path))))
        run.heartbeat({"measuring": "heldout student 4 steps"})
        assert "measuring heldout student 4 steps" in texts(build_run_report(Run.open(run.path)))


def test_afterwards_it_rests_and_says_why(run: Run) -> None:
    assert "state stopped" in texts(build_run_report(run)), "by whoever asked it to, half of its budget"
    run.begin_attempt()
    run.end_attempt("diverged", "student: gradients not finite")
    page = build_run_report(run)
    assert "refresh" not in page.partition("<body>")[0] and "time left" not in page
    assert "student: gradients not finite" in page and "state diverged" in texts(page)


def test_pictures_stand_beside_what_was_measured_at_their_moment(run: Run) -> None:
    Image.new("RGB", (40, 30), "red").save(run.path / "samples" / "0000000016.png")
    page = build_run_report(run)
    moments = page.split('<div class="moment">')[1:]
    assert [re.search(r"After (\d+) images", part)[1] for part in moments] == ["16", "8"], "the newest first"
    assert "<table" not in moments[0] and "4.25" in moments[1].partition("<section>")[0]
    assert page.count("data:image/webp;base64,") == 2
    said = texts(page)
    assert "images prompts weights steps NFE KID" in said and " 8 training captions student 2 2 4.25" in said
    assert "1,234" in said and "last &lt;line&gt;" in said and "abc123" in said


def test_curves_are_the_runs_own_log_and_large_ranges_have_a_logarithmic_axis(run: Run) -> None:
    figure = log_curves([("", 0, pd.DataFrame(run.metrics()))], ["images_per_s"], log_axis=True)
    loss, speed = figure.axes[:2]
    assert (loss.get_title(), loss.get_yscale()) == ("student: distill", "log")
    assert loss.lines[0].get_xydata().tolist() == [[4, 1.0], [8, 0.1], [16, 0.001]]
    assert (speed.get_title(), speed.get_yscale()) == ("images per s", "linear")
    assert build_run_report(run).count("<svg") == 1


def test_a_run_that_has_just_begun_has_a_page(world) -> None:
    page = build_run_report(world.run(world.cells()["full", 0], state="stopped"))
    assert "0 of 32 images" in page and "<svg" not in page and "Pictures" not in page and "Measured" not in page


def test_a_teacher_has_numbers_and_no_training(world) -> None:
    run = world.run(world.cells()["teacher", 0])
    world.measure(run, "kid", 0.0036, 50)
    page = build_run_report(run)
    assert "state done" in texts(page) and "3.6" in page and "train.budget" not in texts(page).partition("Attempts")[0]


def test_nothing_is_loaded_from_elsewhere_and_the_page_is_balanced(run: Run) -> None:
    page = build_run_report(run)
    assert not re.search(r"<(script|link|iframe)\b", page)
    assert all(uri.startswith(("data:image/webp;base64,", "#")) for uri in re.findall(r'(?:src|href)="([^"]*)"', page))
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_a_browser_draws_it_from_disk(run: Run, tmp_path: Path) -> None:
    """Its pictures, its curves and its tables are seen: their colours are on the screen."""
    with run.lock():
        write_report(Run.open(run.path), tmp_path / "page.html")
    seen = tmp_path / "seen.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    words = [BROWSER, *options, "--window-size=1300,2200", f"--screenshot={seen}", f"file://{tmp_path}/page.html"]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(seen).convert("RGB")).astype(int)

    def count(colour: tuple[int, int, int]) -> int:
        return int((abs(pixels - colour).max(axis=-1) < 12).sum())

    assert count(COLOUR) > 0.8 * 400 * 300, "the sheet"
    assert count((0, 0x72, 0xB2)) > 200, "a curve"
    assert count((0x0A, 0x5A, 0x8F)) > 1000, "the bar of progress"


def test_the_command_writes_the_page_of_a_folder_or_an_id(run: Run, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run.path), "--out", "own.html"]) == 0
    assert main(["report", run.id]) == 0
    assert capsys.readouterr().out.split("  (")[0] == "own.html"
    for file in ("own.html", f"out/run-{run.id}.html"):
        assert run.id in (tmp_path / file).read_text().partition("</title>")[0]
    assert main(["report", "0123456789"]) == 2
    assert "'0123456789' is neither a run folder nor the id of a run" in capsys.readouterr().err


def test_following_ends_with_the_run(run: Run, tmp_path: Path, monkeypatch) -> None:
    """The page is written again while somebody trains, and a last time without the order to load it again."""
    pages = []
    with run.lock():
        run.begin_attempt()

        def wait(seconds: float) -> None:
            pages.append((tmp_path / "page.html").read_text())
            if len(pages) == 2:
                run.append_metrics(log_line(BUDGET, 0.0001))
                run.end_attempt("done")
                (run.path / "lock").unlink()

        monkeypatch.setattr("time.sleep", wait)
        assert main(["report", str(run.path), "--out", str(tmp_path / "page.html"), "--follow"]) == 0
    assert len(pages) == 2 and all('http-equiv="refresh"' in page for page in pages)
    last = (tmp_path / "page.html").read_text()
    assert 'http-equiv="refresh"' not in last and "100%" in last


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "1 h 0 min"), (190_000, "2 d 4 h")]
)
def test_durations_are_read_at_a_glance(seconds: float, words: str) -> None:
    assert duration(seconds) == words
