"""The command around a training: what was left unfinished is begun again, what is done is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from core.config import compose, resolve
from core.run import Run
from experiments.sheet import contact_sheet
from experiments.train import train_config


@pytest.mark.parametrize("experiment", ["teacher/tiny", "flash/tiny"])
def test_a_killed_run_is_begun_again_and_a_finished_one_is_not(experiment: str) -> None:
    config = resolve(compose(experiment, ["execution.num_threads=1"]))
    run = Run.create(config)
    with run.lock():
        run.begin_attempt()  # and nobody ends it: the process was killed
    assert run.state() == "failed"
    assert train_config(config) == 0
    assert run.state() == "done" and len(list((run.path / "attempts").iterdir())) == 2
    assert train_config(config) == 0
    assert len(list((run.path / "attempts").iterdir())) == 2


def test_a_finished_run_without_its_last_sheet_gets_the_one_that_training_had_drawn() -> None:
    small = ["eval.metrics=[diversity]", "eval.splits=[train]", "eval.steps=[1]", "execution.sample_every_images=1000"]
    config = resolve(compose("flash/tiny", [*small, "execution.num_threads=1"]))
    assert train_config(config) == 0
    (sheet,) = (Run.create(config).path / "samples").iterdir()
    drawn = sheet.read_bytes()
    sheet.unlink()
    assert train_config(config) == 0 and not sheet.exists()
    assert train_config(config, evaluate=True) == 0
    assert sheet.read_bytes() == drawn


def test_the_sheet_shows_the_steps_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def sheet(prompts: list[str], labels: list[str], images: np.ndarray) -> Image.Image:
        shown.append(labels)
        return contact_sheet(prompts, labels, images)

    monkeypatch.setattr("experiments.train.contact_sheet", sheet)
    for steps in ("[8]", "[1,2,4]"):
        assert train_config(resolve(compose("flash/tiny", [f"eval.steps={steps}", f"seed={len(shown) + 7}"]))) == 0
    assert len(shown) == 4  # each training draws two
    own = [[label.partition(" steps")[0] for label in labels if label.startswith("student")] for labels in shown[::2]]
    assert own == [["student 8"], ["student 4", "student 1 step"]]
