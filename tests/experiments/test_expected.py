"""Expected values agree with their sources, and a run is told which of them it has reached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.stats import summarize
from core.config import ExpectedConfig, UserError, compose, experiments, from_yaml, resolve, run_id
from core.run import Run
from experiments.cli import main
from experiments.expected import MISSED, REACHED, UNMEASURED, outcomes, shortfall
from experiments.verify import FAILED, verify

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "analysis" / "records" / "runs"
EXPECTED = [(name, row) for name in experiments() for row in compose(name).expected]
MEASURED = [(name, row) for name, row in EXPECTED if row.source == "measured"]
PUBLISHED = [(name, row) for name, row in EXPECTED if row.source != "measured"]


def record(experiment: str, *overrides: str) -> Run:
    """The committed record of a configuration."""
    return Run.open(RECORDS / run_id(resolve(compose(experiment, overrides))))


def at_the_end(run: Run, expected: ExpectedConfig) -> dict:
    """The last value of the weights that are evaluated."""
    key = [expected.metric, expected.split, expected.steps, run.config.eval.weights]
    lines = [line for line in run.evals() if [line[k] for k in ("metric", "split", "steps", "weights")] == key]
    return max(lines, key=lambda line: line["images"])


def named(value: object) -> str:
    return f"{value.metric}-{value.split}-{value.steps}" if isinstance(value, ExpectedConfig) else str(value)


@pytest.mark.parametrize(("experiment", "expected"), MEASURED, ids=named)
def test_measured_values_are_those_of_the_records(experiment: str, expected: ExpectedConfig) -> None:
    lines = [at_the_end(record(experiment, f"seed={seed}"), expected) for seed in range(expected.seeds)]
    found = summarize([line["value"] for line in lines])
    assert (f"{found.mean:.4g}", f"{found.sd:.2g}") == (f"{expected.value:.4g}", f"{expected.sd:.2g}")
    assert {line["n"] for line in lines} == {expected.num_images}


@pytest.mark.parametrize(("experiment", "expected"), PUBLISHED, ids=named)
def test_published_values_are_those_of_the_file(experiment: str, expected: ExpectedConfig) -> None:
    table = pd.read_csv(ROOT / "analysis" / "published.csv", dtype={"value": str})
    source, artefact, row = expected.source.split(", ")
    found = table[(table["source"] == source) & (table["artefact"] == artefact) & (table["row"] == row)]
    found = found[(found["metric"] == expected.metric) & (found["nfe"] == expected.steps)]
    (line,) = found.to_dict("records")
    assert float(line["value"]) == expected.value and expected.tolerance > 0
    assert line["scale"] == experiment.partition("/")[2].partition("_")[0]
    assert f" {expected.num_images // 1000}k" in line["protocol"]


def test_the_named_experiments_expect_something() -> None:
    assert {name for name, _ in MEASURED} == {"flash/emoji", "dmd2/emoji", "dmd2/emoji_flux2"}
    published = {"flash/sd15", "flash/sdxl", "flash/pixart", "flash/sd3", "dmd2/sdxl", "lcm/sd15"}
    published |= {f"flash_dmd/{name}" for name in ("sdxl", "sdxl_1k", "sd3", "sd3_4k")}
    assert {name for name, _ in PUBLISHED} == published


def test_no_experiment_inherits_the_values_of_another() -> None:
    for name in {name for name, _ in EXPECTED}:
        assert "\nexpected:\n" in (ROOT / "experiments" / "config" / "experiment" / f"{name}.yaml").read_text()


def test_expectations_do_not_enter_the_id_and_survive_storage(capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "flash/emoji"]) == 0
    shown = capsys.readouterr().out
    assert "- metric: kd_effnet\n  split: train\n" in shown
    read = from_yaml(shown)
    assert read.expected == compose("flash/emoji").expected
    without = resolve(compose("flash/emoji", ["expected=[]"]))
    assert without.expected == [] and run_id(without) == run_id(read) == shown.split()[2]


@pytest.mark.parametrize("change", [{"steps": 0}, {"sd": -1.0}, {"source": "somewhere"}, {"seeds": 0}])
def test_a_wrong_expectation_is_told(change: dict) -> None:
    sound = {"metric": "fid", "split": "val", "steps": 4, "num_images": 1, "value": 1.0, "source": "measured"}
    ExpectedConfig(**sound).validate()
    with pytest.raises(UserError, match=f"expected.{next(iter(change))}="):
        ExpectedConfig(**sound | change).validate()


@pytest.mark.parametrize(
    ("metric", "value", "short"),
    [("fid", 1.5, 0.5), ("fid", 0.5, -0.5), ("clip_score", 0.5, 0.5), ("clip_score", 1.5, -0.5), ("unknown", 0.5, 0.5)],
)
def test_worse_is_the_direction_of_the_metric(metric: str, value: float, short: float) -> None:
    assert shortfall(ExpectedConfig(metric=metric, value=1.0), value) == short


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A copy of a committed record of flash/emoji that a test may change."""
    source = record("flash/emoji").path
    return Run.open(shutil.copytree(source, tmp_path / source.name))


def change_lines(run: Run, **values: object) -> None:
    """Every line of evals.jsonl with other values."""
    file = run.path / "evals.jsonl"
    lines = [json.loads(line) | values for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def failures(run: Run) -> list[str]:
    """The checks that fail."""
    return [check.name for check in verify(run) if check.outcome == FAILED]


def verdicts(run: Run) -> set[str]:
    return {outcome.verdict for outcome in outcomes(run)}


def test_a_run_of_the_experiment_reaches_it(run: Run, capsys: pytest.CaptureFixture) -> None:
    assert verdicts(run) == {REACHED}
    main(["verify", str(run.path)])
    assert (
        "reached       kd_effnet train 4       1.811, expected 1.795 ± 0.054 (measured, 3 seeds)"
        in capsys.readouterr().out
    )


def test_what_is_not_reached_is_told_and_no_failure(run: Run) -> None:
    failed = failures(run)
    change_lines(run, value=9.0)
    metrics = {outcome.expected.metric for outcome in outcomes(run) if outcome.verdict == MISSED}
    assert metrics == {"kd_effnet"}, "a higher CLIP score is better"
    assert failures(run) == failed
    assert "differs" not in outcomes(run)[0].detail
    run.config.train.budget.amount = 64
    assert outcomes(run)[0].detail.endswith("the run differs from the experiment in train.budget.amount")


def test_other_numbers_of_images_are_not_compared(run: Run) -> None:
    change_lines(run, n=8)
    assert verdicts(run) == {UNMEASURED}
    assert "on 8 images cannot be compared with expected 2.676" in outcomes(run)[0].detail
    (run.path / "evals.jsonl").write_text("")
    assert verdicts(run) == {UNMEASURED}


def test_a_run_of_no_known_experiment_expects_nothing(run: Run) -> None:
    run.config.name = "mine/own"
    assert outcomes(run) == []
