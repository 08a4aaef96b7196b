"""The papers' figures: what is drawn where, by value; equal records, equal bytes; no torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ablations.grid import load
from analysis.artefacts import budgets, cost, figure_5, samples, timesteps
from analysis.artefacts.context import Context, finished
from analysis.collect import Results, results
from analysis.index import index_page
from analysis.labels import without_math
from analysis.render import render


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """The six grids of Figure 5 as if every run were measured: KD is 2 plus 0.1 times the row's number plus the seed's
    0.01, and 9 for the row without distillation; the CLIP score is 0.5 minus a tenth of it."""
    empty = tmp_path_factory.mktemp("none")
    out = {}
    for name in (*(name for name, _, _ in figure_5.PANELS), figure_5.GUIDANCE):
        of = results(load(name), "emoji", "full", [empty])
        order = [row.id for row in of.grid.rows]
        frame = of.frame.assign(
            state="done", n=1000, comparable="abc", time="t", images=8960, weights="ema", dirty=False
        )
        frame["fields"] = [{"judge": "judge", "num_reference": 5000}] * len(frame)
        rank = np.array([order.index(row) if row in order else 0 for row in frame["row"]])
        distance = 2 + 0.1 * rank + 0.01 * frame["seed"]
        distance[frame["row"] == "adv-dmd"] = 9.0
        frame["value"] = np.where(frame["metric"] == "clip_score", 0.5 - distance / 10, distance)
        out[name] = dataclasses.replace(of, frame=frame)
    return out


def bars(ax) -> dict[float, tuple[float, float]]:
    """By y: x of the marker and half the width of its error bar."""
    found = {}
    for container in ax.containers:
        x, y = container[0].get_data()
        segment = container[2][0].get_segments()[0] if container[2] else [[0, 0], [0, 0]]
        found[float(y[0])] = (float(x[0]), (segment[1][0] - segment[0][0]) / 2)
    return found


def test_figure_5_shows_means_and_spreads_at_2_nfe(grids: dict[str, Results]) -> None:
    figure = figure_5.draw(grids, "train")
    panels = np.array(figure.axes).reshape(6, 2)
    losses = bars(panels[0][0])
    assert losses.keys() == {0.0, 1.0, 2.0, 3.0}  # the fifth is beyond the axis
    assert losses[2.0] == (pytest.approx(2.21), pytest.approx(0.01))
    assert [text.get_text() for text in panels[0][0].texts] == ["9.00 ± 0.00", "$\\bf{a}$  Loss terms"]
    assert bars(panels[2][1])[1.0][0] == pytest.approx(0.5 - 0.211)
    labels = [label.get_text() for label in panels[3][0].get_yticklabels()]
    assert labels == ["$K$ halved (paper: 16)", "$K$ (paper: 32)", "$K$ doubled (paper: 64)"]
    low, high = panels[0][0].get_xlim()
    assert all(ax.get_xlim() == (low, high) for ax in panels[:5, 0]) and low < 2 and 2.4 < high < 3


def test_figure_5_draws_the_guidance_as_a_curve_and_the_range_as_a_point(grids: dict[str, Results]) -> None:
    ax = figure_5.draw(grids, "heldout").axes[-2]
    curve, point = ax.containers
    assert curve[0].get_xdata().tolist() == [1, 3, 4, 5, 7, 10, 13, 15]
    assert curve[0].get_ydata() == pytest.approx([2.01 + 0.1 * i for i in range(8)])
    assert point[0].get_xdata()[0] == 4 and point[0].get_ydata()[0] == pytest.approx(2.81)
    (span,) = (line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_alpha() is not None)
    assert list(span.get_xdata()) == [2, 6]  # the range of the emoji experiment


def test_a_row_without_runs_says_so(grids: dict[str, Results]) -> None:
    of = grids["flash_losses"]
    frame = of.frame.copy()
    frame.loc[frame["row"] == "distil-adv", "value"] = np.nan
    figure = figure_5.draw(grids | {"flash_losses": dataclasses.replace(of, frame=frame)}, "train")
    assert "no run" in [text.get_text() for text in figure.axes[0].texts]


def test_the_caption_says_what_the_numbers_are(grids: dict[str, Results]) -> None:
    text = figure_5.caption(grids, "heldout")
    numbers = ("3 training seeds", "N = 1,000", "protocol abc (held-out captions)", "8,960", "K = 8")
    for part in ("at 2 NFE, held-out captions", "effnet_lite1", *numbers):
        assert part in text
    assert "training captions" not in text


def test_timesteps_are_the_papers(tmp_path: Path) -> None:
    files = dict(finished(timesteps.build(Context((tmp_path,)))))
    assert files.keys() == {f"figure_{n}.{kind}" for n in (2, 11) for kind in ("png", "pdf", "txt")}
    assert files == dict(finished(timesteps.build(Context((tmp_path,)))))
    figure = timesteps.draw([np.eye(8)[0], np.full(8, 1 / 8)] * 2, ["a", "b", "c", "d"])
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [1, 0, 0, 0, 0, 0, 0, 0]
    dark = [bar.get_facecolor() == figure.axes[1].patches[0].get_facecolor() for bar in figure.axes[1].patches]
    assert dark == [True, False] * 4  # K = 8: every second timestep is sampled


def test_cost_of_each_row_stands_beside_its_quality(full) -> None:
    for seed in (0, 1, 2):
        run = full.run(full.cells()["plain", seed])
        line = {"attempt": 1, "images": 32, "device_hours": 2.0, "evaluations": {"teacher": 320, "student": 64}}
        run.append_metrics(line)
        full.measure(run, "kd_effnet", 3.0 + seed)
    grid = dataclasses.replace(full.grid, metrics=("kd_effnet",))
    of = results(grid, "tiny", "full", [full.runs])
    axes = cost.draw({"influence": of}).axes
    points = [(ax.containers[0][0].get_xdata()[0], ax.containers[0][0].get_ydata()[0]) for ax in axes]
    assert points == [(10.0, 4.0), (2.0, 4.0), (2.0, 4.0)]


def test_quality_stands_on_the_three_axes_of_a_budget(full) -> None:
    for seed in (0, 1, 2):
        run = full.run(full.cells()["plain", seed])
        for step in range(1, 17):  # two student images in a line, three iterations, ten evaluations
            counts = {"iteration": 3 * step, "student_images": 2 * step, "evaluations": {"teacher": 10 * step}}
            loss = 1.0 + (step > 8 and (step - 1) // 2 % 2)  # the same in two lines
            run.append_metrics({"attempt": 1, "images": 4 * step, "device_hours": 0.0, "student/dmd": loss} | counts)
        moments = [(30, 4.0), (64, 2.0)] + [(40, 9.0)] * (seed == 0)  # one of a single seed is not drawn
        for images, value in moments:
            full.measure(run, "kd_effnet", value + seed, images=images)
    of = results(dataclasses.replace(full.grid, metrics=("kd_effnet",)), "tiny", "full", [full.runs])
    *quality, steadiness = budgets.draw(of).axes
    lines = [ax.containers[0][0].get_data() for ax in quality]
    for (x, y), last in zip(lines, (48, 32, 160), strict=True):
        assert x * 1000 == pytest.approx([last * 30 / 64, last]) and y == pytest.approx([5.0, 3.0])
    x, y = steadiness.containers[0][0].get_data()
    assert x == pytest.approx(np.arange(0.5, 4) / 4)
    late = np.std([1.0, 2.0] * 3, ddof=1) / 1.5  # two means over four student images of each seed
    assert y == pytest.approx([0, 0, late, late])


def _sampled(weights: str, steps: int, guidance: float, images: int | None = None) -> dict[str, Any]:
    """How a picture was made, as samples.json says it; the label of its column is any text."""
    setting = f"column {weights} {steps} {images}"
    entry = {"setting": setting, "weights": weights, "steps": steps, "guidance": guidance}
    return entry if images is None else entry | {"images": images}


@pytest.mark.parametrize("name", ["figure_4", "checkpoints"])
def test_samples_are_laid_out(tmp_path: Path, name: str) -> None:
    assert list(samples.build(Context(()), tmp_path)) == []
    folder, entries = tmp_path / name, []
    folder.mkdir()
    for p, prompt in enumerate(("red apple", "a very long caption of a picture")):
        for s, setting in enumerate((("teacher", 50, 3.0), ("ema", 1, 1.0))):
            file = f"{p}{s}.png"
            Image.new("RGB", (8, 8), (100 * p, 100 * s, 0)).save(folder / file)
            entries.append({"file": file, "prompt": prompt} | _sampled(*setting))
    facts = {"run": "0123456789", "images": 5, "commit": "abcdef0123456789", "files": entries}
    (folder / "samples.json").write_text(json.dumps(facts))
    files = dict(finished(samples.build(Context(()), tmp_path)))
    assert files.keys() == {f"{name}.{kind}" for kind in ("png", "pdf", "txt")}
    assert "Run 0123456789 after 5 images, commit abcdef012345." in files[f"{name}.txt"]
    axes = np.array(samples.draw(folder, entries).axes).reshape(2, 2)
    shown = [[tuple(ax.images[0].get_array()[0, 0]) for ax in row] for row in axes]
    assert shown == [[(0, 0, 0), (0, 100, 0)], [(100, 0, 0), (100, 100, 0)]]
    assert [ax.get_title() for ax in axes[0]] == ["teacher\n50 steps, w = 3", "student (EMA)\n1 step"]
    assert axes[1][0].get_ylabel() == "a very long\ncaption of a\npicture"


@pytest.mark.parametrize("name", samples.TEXTS)
def test_the_committed_pictures_are_where_they_are_looked_for(name: str) -> None:
    facts = json.loads((samples.PICTURES / name / "samples.json").read_text())
    assert facts["files"] and all((samples.PICTURES / name / entry["file"]).is_file() for entry in facts["files"])


def test_titles_of_checkpoints_stand_apart(tmp_path: Path) -> None:
    settings = [_sampled("teacher", 50, 3.0), *(_sampled("ema", 4, 1.0, images) for images in (0, 64_032, 96_000))]
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    entries = [{"file": "0.png", "prompt": "red apple"} | setting for setting in settings]
    figure = samples.draw(tmp_path, entries)
    figure.savefig(tmp_path / "figure.png")
    titles = [ax.title for ax in figure.axes]
    assert [title.get_text().rpartition("\n")[2] for title in titles] == [
        "50 steps, w = 3",
        "before training",
        "64,032 images",
        "96,000 images",
    ]
    boxes = [title.get_window_extent() for title in titles]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_everything_is_built_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from analysis.results import write_results\n"
        "found = [next(write_results(Path(sys.argv[1]))) for _ in range(1)]\n"
        "import analysis.artefacts.grids, analysis.artefacts.cost\n"
        "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    assert (tmp_path / "figure_2.png").exists()


class Links(HTMLParser):
    """Everything that a page refers to, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.targets += [value for value in (values.get("href"), values.get("src")) if value]
        self.anchors |= {values["id"]} if "id" in values else set()


def test_the_index_shows_every_file_and_nothing_else(tmp_path: Path) -> None:
    context = Context((tmp_path,))
    name = next(iter(context.grids))
    table = render(context.tables[name], "html")
    png = Image.new("RGB", (8, 8))
    written = {
        "claims.md": "none", f"{name}.html": table, f"{name}.csv": "", f"{name}.png": png.tobytes(),
        f"{name}.txt": "A figure.", f"{name}-training.png": b"", f"{name}-training.txt": "Losses: all.",
        "cost.png": b"", "cost.txt": "Distance (Sec. 4.2): KD <and> more. Further.", "table_2-paper.csv": "",
    }  # fmt: skip
    page = index_page(written, context)
    found = Links()
    found.feed(page)
    targets = {target for target in found.targets if not target.startswith("#")}
    assert targets == written.keys()
    assert {target[1:] for target in found.targets if target.startswith("#")} <= found.anchors
    title = without_math(context.grids[name].grid.title)
    assert f"<h2>{title}</h2>" in page and f"<h2>{title}, in training</h2>" in page
    assert "<h2>Distance (Sec. 4.2)</h2>" in page and "<h2>Table 2, at paper scale</h2>" in page
    assert 'srcset="cost.png 2x"' in page  # at a size that fits the text around it
    assert "KD &lt;and&gt; more" in page and table.splitlines()[0] in page
