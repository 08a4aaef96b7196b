"""The identity of a number, and the cost of a run."""

import dataclasses
import subprocess
import sys

import pytest

from core.metrics.cost import TrainingCost, training_cost
from core.metrics.protocol import Protocol, comparable_id

BASE = Protocol(
    metric="kd_effnet",
    scale="emoji",
    split="heldout",
    data_hash="d0",
    prompts_hash="p0",
    num_images=1000,
    judge="efficientnet-lite0",
    judge_hash="57",
    resize="native",
    estimator="unbiased",
    reference_hash="r0",
    num_reference=5000,
    solver="lcm",
    steps=4,
)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Protocol)])
def test_every_field_changes_the_id_and_only_the_sampling_leaves_values_comparable(field: str) -> None:
    value = getattr(BASE, field)
    other = dataclasses.replace(BASE, **{field: value + 1 if isinstance(value, int | float) else value + "x"})
    assert other.id != BASE.id
    same = other.comparable_id == BASE.comparable_id
    assert same == (field in ("solver", "steps", "guidance", "cache", "sampling_seed"))


def test_ids_are_stable_and_recorded_fields_give_the_same_comparable_id() -> None:
    assert (BASE.id, BASE.comparable_id) == ("cf6fad2a", "e233a736")
    assert comparable_id(BASE.fields()) == BASE.comparable_id
    assert Protocol(**BASE.fields()) == BASE


def test_protocol_needs_no_torch() -> None:
    modules = "core.metrics.protocol, core.metrics.cost, core.data.requests"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_cost_is_read_from_the_newest_line() -> None:
    lines = [
        {"images": 200, "device_hours": 0.2, "evaluations": {"teacher": 80, "student": 200}},
        {"images": 100, "device_hours": 0.1, "evaluations": {"teacher": 40, "student": 100}},
    ]
    cost = training_cost(lines)
    assert cost == TrainingCost(200, 0.2, {"teacher": 80, "student": 200})
    assert cost.total_evaluations == 280
    assert training_cost([]).total_evaluations == 0
