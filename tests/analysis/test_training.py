"""Numbers of a training's log, by value."""

from __future__ import annotations

import math

import pytest

from analysis.training import TRAINING, by_seed, equal_means
from core.catalogue import READINGS


def test_every_reading_of_the_catalogue_is_read_somewhere() -> None:
    assert TRAINING.keys() == READINGS.keys()


def test_numbers_of_a_log(full) -> None:
    run = full.run(full.cells()["plain", 0])
    assert all(math.isnan(value(run)) for value in TRAINING.values())
    for images, norm in ((2, 9.0), (4, 9.0), (6, 1.0), (8, 3.0)):
        counts = {"evaluations": {"teacher": 10 * images, "student": 5 * images}, "stored_evaluations": 2 * images,
                  "student_images": images}  # fmt: skip
        run.append_metrics({"attempt": 1, "images": images, "device_hours": 0.5, "student/grad_norm": norm,
                            "student/dmd": 2 * norm + 1} | counts)  # fmt: skip
    run.note(trainable_parameters={"student": 30, "critic": 12})
    found = {name: value(run) for name, value in TRAINING.items()}
    assert found == {
        "teacher_evaluations": 12.0,
        "student_evaluations": 5.0,
        "gradient_variation": pytest.approx(math.sqrt(2) / 2),  # second half: mean 2, sd sqrt(2)
        "loss_variation": pytest.approx(2 * math.sqrt(2) / 5),  # 3 and 7
        "trainable_parameters": 42.0,
        "device_hours": 0.5,
    }
    assert by_seed(full.results().items, "plain", "trainable_parameters") == {0: 42.0}


@pytest.mark.parametrize("ratio", [1, 4])
def test_the_losses_variation_compares_means_of_as_many_updates(full, ratio) -> None:
    """One noise at both ratios: a line holds one student update in ``ratio`` at 4:1, whose lines alone vary more."""
    run = full.run(full.cells()["plain", 0])
    noise = [1.0, 3.0, 1.0, 7.0] * 8
    for line in range(32):
        loss = noise[line] if ratio == 4 else sum(noise[line % 8 * 4 :][:4]) / 4
        counts = {"images": 4 * (line + 1), "student_images": 4 * (line + 1) // ratio, "evaluations": {}}
        run.append_metrics({"attempt": 1, "student/dmd": loss, **counts})
    points = equal_means(run, "student/dmd")
    assert [value for _, value in points] == pytest.approx([3.0] * (32 // ratio))
    assert [at for at, _ in points][-1] == pytest.approx(1 - 0.5 / (32 // ratio))
    assert TRAINING["loss_variation"](run) == pytest.approx(0.0)
