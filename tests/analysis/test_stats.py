"""Statistics over seeds against hand-computed values."""

from __future__ import annotations

import math

import pytest

from analysis.stats import summarize


def test_summary_of_three_values() -> None:
    found = summarize([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert found.half_width == pytest.approx(4.302652730 / math.sqrt(3))  # t quantile .975 with 2 degrees of freedom


def test_one_value_has_no_spread_and_decides_nothing() -> None:
    found = summarize([5.0])
    assert found.mean == 5.0 and math.isnan(found.sd) and math.isnan(found.half_width)


def test_no_value_is_nan() -> None:
    assert math.isnan(summarize([]).mean) and summarize([]).n == 0
