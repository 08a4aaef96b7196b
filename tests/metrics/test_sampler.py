"""A sampler as one object: what protocols and columns of pictures say of it, and what its pictures cost."""

import pytest

from core.config import compose
from core.metrics.cost import SamplingCost
from core.metrics.protocol import Protocol
from core.sampler import Sampler, Setting, teacher_setting


@pytest.mark.parametrize(
    ("sampler", "solver"),
    [(Sampler("lcm", 4), "lcm"), (Sampler("ddim", 2), "ddim"), (Sampler("ddim", 2, eta=0.3), "ddim eta=0.3")],
)
def test_a_protocol_names_the_sampler_as_the_committed_records_do(sampler: Sampler, solver: str) -> None:
    empty = dict.fromkeys(
        ("metric", "scale", "split", "data_hash", "prompts_hash", "judge", "judge_hash", "resize", "estimator"), ""
    )
    fields = Protocol(**empty, num_images=1, **sampler.protocol_fields()).fields()
    assert (fields["solver"], fields["steps"], fields["guidance"]) == (solver, sampler.steps, 1.0)
    assert "cache" not in fields, "numbers older than caches keep their ids"


def test_an_unknown_cache_is_refused() -> None:
    with pytest.raises(AssertionError, match="teacache"):
        Sampler("lcm", 4, cache="teacache")


def test_settings_are_those_of_the_configuration() -> None:
    words = ["eval.sampler=ddim", "eval.eta=0.5", "eval.steps=[1,4]"]
    expected = [Setting("student", Sampler("ddim", steps, eta=0.5)) for steps in (1, 4)]
    assert compose("flash/tiny", words).settings() == expected


def test_columns_of_pictures_say_whose_they_are() -> None:
    assert teacher_setting(50, 4.0).label == "teacher 50 steps w=4"
    assert Setting("student", Sampler("lcm", 1)).label == "student 1 step"


def test_the_cost_of_a_picture_is_what_was_counted() -> None:
    whole = SamplingCost(2, {"teacher": 8}) + SamplingCost(1, {"teacher": 4, "student": 3})
    assert whole == SamplingCost(3, {"teacher": 12, "student": 3})
    assert (whole.nfe, type(whole.nfe)) == (5, int), "a whole number is recorded as one"
    assert SamplingCost(4, {"student": 10}).nfe == 2.5, "a cache saves some of the evaluations"
