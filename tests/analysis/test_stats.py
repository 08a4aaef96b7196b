"""Statistics over seeds against hand-computed values."""

from __future__ import annotations

import math

import pytest

from analysis.stats import paired_difference, summarize


def test_summary_of_three_values() -> None:
    found = summarize([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert found.half_width == pytest.approx(4.302652730 / math.sqrt(3))  # t quantile .975 with 2 degrees of freedom


def test_one_value_has_no_spread_and_decides_nothing() -> None:
    found = summarize([5.0])
    assert found.mean == 5.0 and math.isnan(found.sd) and not found.excludes_zero()


def test_no_value_is_nan() -> None:
    assert math.isnan(summarize([]).mean) and summarize([]).n == 0


def test_pairs_are_made_within_a_seed() -> None:
    found = paired_difference({0: 1.0, 1: 10.0, 2: 100.0, 7: 5.0}, {0: 2.0, 1: 11.1, 2: 100.9})
    assert found.n == 3
    assert found.mean == pytest.approx(-1.0) and found.sd == pytest.approx(0.1)
    assert found.excludes_zero()


def test_interval_that_contains_zero_is_undecided() -> None:
    assert not summarize([-1.0, 1.0, 0.1]).excludes_zero()
