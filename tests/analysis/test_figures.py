"""Figures: equal bytes for equal input, paper width, all rows told apart, the page's colours when inline."""

from __future__ import annotations

import dataclasses

import pytest

from ablations.grid import load, names
from analysis.collect import RECORDS, cell_runs, results
from analysis.figures import (
    COLOURS,
    DASHES,
    MARKERS,
    caption,
    encode,
    grid_figure,
    inline_svg,
    look,
    training_curves,
)
from analysis.render import render


@pytest.mark.parametrize("format", ["png", "pdf"])
def test_equal_bytes_twice(full, format) -> None:
    frame = full.frame()
    first = encode(grid_figure(full.grid, frame), format)
    assert first == encode(grid_figure(full.grid, frame), format)
    assert len(first) > 5_000


def test_one_column_wide_with_labels_and_every_row_in_the_legend(full) -> None:
    figure = grid_figure(full.grid, full.frame())
    assert figure.get_size_inches()[0] == 3.4
    assert [ax.get_ylabel() for ax in figure.axes] == [r"KID $\times 10^{3}$ ↓", "CLIP score ↑"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "Teacher, 50 steps (100 NFE)",
        r"$L_{\mathrm{distil}}$",
        r"$L_{\mathrm{distil}} + L_{\mathrm{DMD}}$",
    ]


def test_points_are_means_in_shown_units_with_error_bars(full) -> None:
    figure = grid_figure(full.grid, full.frame())
    points, _, (bars,) = figure.axes[0].containers[0]
    assert points.get_ydata() == pytest.approx([5.0, 5.0])
    assert bars.get_segments()[0][:, 1] == pytest.approx([4.0, 6.0])
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([3.6, 3.6])  # the teacher


def test_steps_that_only_another_grid_has_measured_are_not_drawn(full) -> None:
    run = full.run(full.cells()["full", 0])
    for metric in ("kid", "clip_score"):
        full.measure(run, metric, 0.001, steps=4)
    assert 4 in set(full.frame()["nfe"])
    for ax in grid_figure(full.grid, full.frame()).axes:
        drawn = [[round(nfe) for nfe in container[0].get_xdata()] for container in ax.containers]
        assert drawn == [[1, 2], [1, 2]]


def test_rows_differ_in_colour_marker_and_dash() -> None:
    assert len(set(COLOURS)) == len(set(MARKERS)) == len(COLOURS) == len(DASHES)
    looks = [(look(i)["color"], look(i)["marker"], str(look(i)["linestyle"])) for i in range(len(COLOURS))]
    assert len({marker for _, marker, _ in looks}) == len({colour for colour, _, _ in looks}) == len(looks)


def test_inline_form_takes_the_page_colours(full) -> None:
    text = inline_svg(grid_figure(full.grid, full.frame()))
    assert text.startswith("<svg") and "currentColor" in text and "var(--rule)" in text
    assert "#010203" not in text


def test_caption_states_source_seeds_protocol_and_n(full) -> None:
    text = caption(full.grid, full.frame())
    assert "A paper, Figure 5" in text and "3 training seeds" in text and "N = 100 images" in text
    assert full.frame()["comparable"].dropna().iloc[0] in text


def test_training_curves_draw_each_logged_term_of_the_first_seed(full) -> None:
    run = full.run(full.cells()["full", 0])
    for images in (8, 16, 32):
        terms = {"student/dmd": 1 / images, "student/grad_norm": 1.0}
        run.append_metrics({"attempt": 1, "iteration": images // 4, "images": images, **terms})
    figure = training_curves(cell_runs(full.grid, "tiny", "full", [full.runs]))
    assert figure is not None
    assert [ax.get_title() for ax in figure.axes if ax.get_visible()] == ["student/dmd", "student/grad_norm"]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([1 / 8, 1 / 16, 1 / 32])


def test_no_curves_without_logs(full) -> None:
    assert training_curves(cell_runs(full.grid, "tiny", "full", [full.runs])) is None


def test_a_grid_of_no_paper_is_named_without_one(full, monkeypatch) -> None:
    monkeypatch.setattr(full, "grid", dataclasses.replace(full.grid, source=""))
    assert caption(full.grid, full.frame()).startswith("Influence of a term. Points are")
    table = full.table()
    assert "\n*tiny scale, full budget*\n" in render(table, "md")
    assert r"\caption{Influence of a term. " in render(table, "tex")


def test_every_teacher_has_a_curve_of_its_own() -> None:
    """Two teachers, or two solvers of one, at the same evaluations are not one point."""
    grid = load("dmd2_teachers")
    axes = grid_figure(grid, results(grid, "emoji", "full", [RECORDS]).frame).axes
    drawn = {line.get_label(): (list(line.get_xdata()), line.get_marker()) for line in axes[0].lines}
    assert drawn["emoji-sd, few steps"] == ([8], "x") and drawn["emoji-flux2, few steps"] == ([8], "+")


@pytest.mark.parametrize("name", [name for name in names() if "emoji" in load(name).base])
def test_a_legend_fits_above_its_figure(name: str) -> None:
    grid = load(name)
    figure = grid_figure(grid, results(grid, "emoji", "full", [RECORDS]).frame)
    figure.draw_without_rendering()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
