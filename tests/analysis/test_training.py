"""Numbers of a training's log, by value."""

from __future__ import annotations

import math

import pytest

from analysis.training import TRAINING, by_seed


def test_numbers_of_a_log(full) -> None:
    run = full.run(full.cells()["plain", 0])
    assert all(math.isnan(value(run)) for value in TRAINING.values())
    for images, norm in ((2, 9.0), (4, 9.0), (6, 1.0), (8, 3.0)):
        counts = {"evaluations": {"teacher": 10 * images, "student": 5 * images}, "stored_evaluations": 2 * images}
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
