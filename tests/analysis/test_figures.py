"""Figures: equal bytes for equal input, paper width, all rows told apart, the page's colours when inline."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablations.grid import load, names
from analysis.collect import RECORDS, cell_runs, results
from analysis.dots import limits
from analysis.figures import caption, grid_figure
from analysis.log_curves import training_curves
from analysis.looks import COLOURS, DASHES, GREY, MARKERS, encode, inline_svg, legend_above, look, style, wrapped
from analysis.render import render
from analysis.stats import summarize


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
        r"$L_{\mathrm{distil}}$",
        r"$L_{\mathrm{distil}} + L_{\mathrm{DMD}}$",
        "Teacher, 50 steps (100 NFE)",
    ]


def test_points_are_means_in_shown_units_with_error_bars(full) -> None:
    figure = grid_figure(full.grid, full.frame())
    points, _, (bars,) = figure.axes[0].containers[0]
    assert points.get_ydata() == pytest.approx([5.0, 5.0])
    assert bars.get_segments()[0][:, 1] == pytest.approx([4.0, 6.0])
    assert figure.axes[0].lines[-1].get_ydata() == pytest.approx([3.6, 3.6])  # the teacher


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


def test_more_rows_than_colours_still_differ_with_and_without_markers() -> None:
    """Points differ by colour and marker; curves of a training, which have no markers, by colour and dash."""
    assert len(set(map(str, DASHES))) == len(DASHES)
    looks = [look(i) for i in range(64)]
    assert len({(one["color"], one["marker"]) for one in looks}) == 64
    assert len({(one["color"], str(one["linestyle"])) for one in looks}) == 64


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
    figure = training_curves(full.grid, cell_runs(full.grid, "tiny", "full", [full.runs]))
    assert figure is not None
    assert [ax.get_title() for ax in figure.axes if ax.axison] == ["student: dmd", "student: grad norm"]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([1 / 8, 1 / 16, 1 / 32])


def test_no_curves_without_logs(full) -> None:
    assert training_curves(full.grid, cell_runs(full.grid, "tiny", "full", [full.runs])) is None


def test_a_grid_of_no_paper_is_named_without_one(full, monkeypatch) -> None:
    monkeypatch.setattr(full, "grid", dataclasses.replace(full.grid, source=""))
    assert caption(full.grid, full.frame()).startswith("Influence of a term. Points are")
    table = full.table()
    assert "\n*tiny scale, full budget*\n" in render(table, "md")
    assert r"\caption{Influence of a term. " in render(table, "tex")


def test_references_that_name_a_curve_are_joined_and_others_are_lines() -> None:
    """Two solvers of one teacher at the same evaluations are not one point."""
    grid = load("few_steps")
    figure = grid_figure(grid, results(grid, "emoji", "full", [RECORDS]).frame)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][2:] == [
        "Teacher, few steps", "Teacher, UniPC, few steps", "Teacher, 50 steps (100 NFE)"
    ]  # fmt: skip
    drawn = {line.get_marker(): list(line.get_xdata()) for line in figure.axes[0].lines if line.get_color() == GREY}
    assert drawn == {"x": [1, 2, 4, 8, 16], "+": [4, 8, 16]}
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["1", "2", "4", "8", "16"]


def _dots(ax: Axes) -> dict[float, float]:
    """By height: where the points of a panel of dots are."""
    return {float(c[0].get_ydata()[0]): float(c[0].get_xdata()[0]) for c in ax.containers}


def test_rows_of_one_point_are_dots_beside_their_labels(full) -> None:
    frame = full.frame()
    figure = grid_figure(full.grid, frame[frame["reference"] | (frame["nfe"] == 2)])
    distance, alignment = figure.axes
    assert _dots(distance) == pytest.approx({0: 5.0, 1: 4.0, 2: 3.6})
    assert _dots(alignment) == pytest.approx({0: 0.305, 1: 0.304, 2: 0.3036})
    labels = [label.get_text() for label in distance.get_yticklabels()]
    assert labels[0] == r"$L_{\mathrm{distil}}$" and labels[2].replace("\n", " ") == "Teacher, 50 steps (100 NFE)"
    assert "at 2 network evaluations" in figure.get_supxlabel() and not figure.legends


def test_what_nobody_has_measured_is_left_out_and_said(full) -> None:
    frame = full.frame()
    frame.loc[frame["metric"] == "clip_score", "value"] = math.nan
    frame.loc[frame["row"] == "full", "value"] = math.nan
    assert [ax.get_ylabel() for ax in grid_figure(full.grid, frame).axes] == [r"KID $\times 10^{3}$ ↓"]
    assert "Not measured, so not drawn: CLIP score, L_distil + L_DMD." in caption(full.grid, frame)
    layout = dataclasses.replace(full.grid.layout, splits=["train", "heldout"])
    both = dataclasses.replace(full.grid, layout=layout)
    half = full.frame()
    half = pd.concat([half, half[half["metric"] == "kid"].assign(split="heldout")], ignore_index=True)
    axes = grid_figure(both, half).axes
    assert [ax.axison for ax in axes] == [True, True, True, False]
    assert axes[3].texts[0].get_text() == "not measured"
    assert "Not measured, so not drawn: CLIP score on held-out captions." in caption(both, half)


def test_nothing_measured_is_a_sentence(world) -> None:
    figure = grid_figure(world.grid, world.frame())
    assert not figure.axes and figure.texts[0].get_text() == "No run has been evaluated yet."


def _is_within(figure: Figure) -> bool:
    """Whether everything that is drawn, text included, lies on the canvas."""
    encode(figure, "png")
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


LONG = "a label that goes on about every setting of a run: " + "its losses, their weights, " * 3
WORD = "a_name_without_a_single_space_in_it_" * 3


@pytest.mark.parametrize("label", [LONG, WORD, "$L_{distil}$ and " + LONG])
@pytest.mark.parametrize("steps", [(1, 2), (2,)])
def test_long_labels_are_wrapped_and_never_clipped(full, label: str, steps: tuple[int, ...]) -> None:
    rows = tuple(dataclasses.replace(row, label=f"{index} {label}") for index, row in enumerate(full.grid.rows))
    grid, frame = dataclasses.replace(full.grid, rows=rows), full.frame()
    figure = grid_figure(grid, frame[frame["reference"] | frame["nfe"].isin(steps)])
    assert _is_within(figure)
    assert min(ax.get_position().width * figure.get_figwidth() for ax in figure.axes) > 1.0
    assert min(ax.get_position().height * figure.get_figheight() for ax in figure.axes) > 0.5


def test_only_what_lies_far_out_leaves_the_axis() -> None:
    near, far = ([summarize([mean]) for mean in (1.0, 1.1, 1.2, 1.3, last)] for last in (2.2, 90.0))
    assert limits(near)[1] > 2.2
    assert 1.3 < limits(far)[1] < 1.4
    assert 1.3 < limits(near, 3.0)[1] < 1.4


def test_a_legend_has_columns_of_equal_length() -> None:
    with style():
        figure = Figure(figsize=(7.0, 2.0))
        (line,) = figure.subplots().plot([0, 1])
        legend_above(figure, dict.fromkeys("abcd", line), 3)
    assert figure.legends[0]._ncols == 2 and figure.get_figheight() > 2.2


def test_wrapping_keeps_words_and_mathematics_whole() -> None:
    with style():
        text = wrapped(Figure(), "one $a + b$ two three", 0.5, 8.0)
        assert text.split("\n") == ["one $a + b$", "two three"]
        assert wrapped(Figure(), "one", 9.0, 8.0) == "one"


@pytest.mark.parametrize("name", [name for name in names() if "emoji" in load(name).base])
def test_nothing_is_clipped(name: str) -> None:
    grid = load(name)
    assert _is_within(grid_figure(grid, results(grid, "emoji", "full", [RECORDS]).frame))
