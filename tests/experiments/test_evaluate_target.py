"""Which run a command means, and what may be changed about it."""

from pathlib import Path

import pytest

from core.config import UserError, compose, resolve, run_id
from core.run import Run
from experiments.target import open_target, override


@pytest.fixture
def run(tmp_path: Path) -> Run:
    paths = [f"execution.runs_dir={tmp_path}/runs", f"execution.cache_dir={tmp_path}/cache"]
    return Run.create(resolve(compose("flash/tiny", paths)))


def test_folder_id_and_experiment_name_the_same_run(run: Run, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    by_name = open_target("flash/tiny", [f"execution.cache_dir={tmp_path}/cache"], runs)
    assert open_target(str(run.path)).path == open_target(run.id, runs_dir=runs).path == by_name.path == run.path


def test_only_evaluation_and_execution_change(run: Run, tmp_path: Path) -> None:
    changed = open_target(run.id, ["eval.num_images=5", "eval.steps=[1,3]", "execution.device=cpu"], tmp_path / "runs")
    config = changed.config
    assert (config.eval.num_images, config.eval.steps, config.execution.device) == (5, [1, 3], "cpu")
    assert run_id(config) == run.id
    assert run.config.eval.num_images != 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.batch_size=8", "train.batch_size says what the run is and cannot be changed"),
        ("eval.num_images", "is not an override; write key=value"),
        ("eval.num_imagse=5", "num_imagse"),
        ("eval.num_images=many", "eval.num_images=many"),
        ("eval.metrics=[fdi]", "eval.metrics=fdi is unknown; allowed: kd_effnet"),
    ],
)
def test_wrong_overrides_are_one_clear_line(run: Run, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        override(run.config, [text])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'0123456789' is neither a run folder nor the id of a run"):
        open_target("0123456789", runs_dir=tmp_path)
