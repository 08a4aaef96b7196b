"""The catalogue: one row makes a metric a choice, measured, a column and an entry of the glossary."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ablations.grid import load
from analysis.columns import column, glossary, shown_column
from analysis.drawn import figure_metrics
from core.catalogue import METRICS, STANDARD, Judge, Metric, register_metric
from core.config import UserError, compose, resolve
from core.data.requests import Requests
from core.metrics.cost import SamplingCost
from core.metrics.measure import FORMULAS, register_formula
from core.run import Run
from core.sampler import Setting
from experiments.evaluate import evaluate
from experiments.judges import JUDGES
from experiments.session import Pictures

ROOT = Path(__file__).parents[2]
BRIGHTNESS = Metric(
    name="toy_brightness",
    label="Brightness",
    meaning="mean grey value",
    better="max",
    power=2,
    judge=Judge("toy_eye", "no network at all", "none"),
    estimator="mean of means",
    resolves="day from night",
)


class Eye:
    """A judge that needs no weights."""

    name, hash, resize = "eye", "e0", "native"

    def outputs(self, images: np.ndarray, requests: Requests) -> np.ndarray:
        return images.reshape(len(images), -1).mean(axis=1) / 255


@pytest.fixture
def registered() -> Iterator[Metric]:
    """A metric with a formula and a judge of its own, added from outside of the packages; gone after the test."""
    before = [(registry, dict(registry)) for registry in (METRICS, FORMULAS, JUDGES)]
    register_formula(BRIGHTNESS.estimator, lambda outputs, real: float(outputs.mean()))
    JUDGES[BRIGHTNESS.judge.name] = lambda config, backbone: Eye()
    yield register_metric(BRIGHTNESS)
    for registry, rows in before:
        registry.clear()
        registry.update(rows)


class WhiteSession:
    """A session that draws white pictures, three evaluations each."""

    def __init__(self, run: Run) -> None:
        self.config, self.images, self.backbone = run.config, 32, SimpleNamespace(device="cpu")

    def unchanged(self) -> AbstractContextManager:
        return nullcontext()

    def sample(self, requests: Requests, setting: Setting, seed: int, *, first: int) -> Pictures:
        white = np.full((len(requests), 8, 8, 3), 255, dtype=np.uint8)
        return Pictures(white, SamplingCost(len(requests), {"student": 3 * len(requests)}))


def test_a_metric_from_outside_is_a_choice_and_is_measured(registered: Metric, tmp_path: Path) -> None:
    paths = [f"execution.runs_dir={tmp_path}/runs", f"execution.cache_dir={tmp_path}/cache"]
    words = [f"eval.metrics=[{registered.name}]", "eval.steps=[1]", "eval.splits=[heldout]", "eval.num_images=4"]
    run = Run.create(resolve(compose("flash/tiny", [*paths, *words])))
    (line,) = evaluate(WhiteSession(run), run, say=lambda text: None)
    assert (line["metric"], line["value"], line["n"], line["nfe"]) == (registered.name, 1.0, 4, 3)
    fields = line["protocol_fields"]
    assert (fields["judge"], fields["judge_hash"], fields["estimator"]) == ("eye", "e0", "mean of means")


def test_a_metric_from_outside_has_a_column_and_an_entry_in_the_glossary(registered: Metric, tmp_path: Path) -> None:
    assert column(registered.name).heading == "Brightness ×10² ↑"
    assert column(registered.name).factor == 100
    (row,) = [line for line in glossary() if registered.name in line]
    assert row == (
        "| Brightness ×10² ↑ | `toy_brightness` | mean grey value | no network at all | none | day from night |"
    )
    file = tmp_path / "toy.yaml"
    file.write_text(
        "title: T\nbase: {tiny: flash/tiny}\nrows: [{id: plain}]\n"
        f"metrics: [{registered.name}, diversity]\nlayout: {{best: [{registered.name}]}}\n"
    )
    grid = load(str(file))
    assert [shown_column(grid, name).better for name in grid.metrics] == ["max", ""]
    assert figure_metrics(grid) == [registered.name]


def test_what_is_not_registered_is_no_choice() -> None:
    with pytest.raises(UserError, match="eval.metrics=toy_brightness is unknown; allowed: kd_effnet, fd_effnet"):
        compose("flash/tiny", ["eval.metrics=[toy_brightness]"])


def test_a_name_stands_for_one_row() -> None:
    with pytest.raises(AssertionError, match="kid"):
        register_metric(METRICS["kid"])


def test_every_judge_of_the_catalogue_can_be_loaded() -> None:
    assert {metric.judge.name for metric in METRICS.values()} == JUDGES.keys()


def test_what_is_measured_by_default_needs_no_download() -> None:
    assert STANDARD == ("kd_effnet", "fd_effnet", "clip_score", "diversity")


def test_names_are_written_in_the_catalogue_alone() -> None:
    """Elsewhere a metric is named by its row, so that no second list of names can fall behind."""
    quoted = re.compile("|".join(f'"{name}"' for name in METRICS))
    found = []
    for package in ("core", "experiments", "ablations", "analysis", "slurm"):
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "catalogue.py" and quoted.search(file.read_text()):
                found.append(str(file.relative_to(ROOT)))
    assert found == []
