"""Statistics over seeds against hand-computed values."""

from __future__ import annotations

import math

import pytest

from analysis.stats import paired_difference, seeds_to_decide, summarize


def test_summary_of_three_values() -> None:
    found = summarize([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert found.half_width == pytest.approx(4.302652730 / math.sqrt(3))  # t quantile .975 with 2 degrees of freedom


def test_one_value_has_no_spread_and_decides_nothing() -> None:
    found = summarize([5.0])
    assert found.mean == 5.0 and math.isnan(found.sd) and math.isnan(found.half_width)


def test_no_value_is_nan() -> None:
    assert math.isnan(summarize([]).mean) and summarize([]).n == 0


def test_pairs_are_made_within_a_seed() -> None:
    found = paired_difference({0: 1.0, 1: 10.0, 2: 100.0, 7: 5.0}, {0: 2.0, 1: 11.1, 2: 100.9})
    assert found.n == 3
    assert found.mean == pytest.approx(-1.0) and found.sd == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("sd", "distance", "seeds"),
    [(1.0, 2.5, 3), (1.0, 2.48, 4), (1.0, 0.51, 18), (1.0, 0.1, None), (math.nan, 1.0, None), (0.0, 0.1, 2)],
)
def test_seeds_that_would_decide(sd: float, distance: float, seeds: int | None) -> None:
    """3 values: 4.3027 / sqrt(3) = 2.484; 18 values: 2.1098 / sqrt(18) = 0.497; 17: 2.1199 / sqrt(17) = 0.514."""
    assert seeds_to_decide(sd, distance, 50) == seeds
