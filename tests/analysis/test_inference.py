"""Tests of differences against closed forms, scipy, and their own promise: levels kept, planted effects found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis import spread
from analysis.inference import (
    NOTHING_KNOWN,
    Estimate,
    Prior,
    average_power,
    false_discovery_rates,
    fit_prior,
    paired,
    power,
    ratio_interval,
    unpaired,
)
from analysis.plan_power import detectable
from analysis.spread import Spread, spread_of


def test_plain_tests_are_scipys() -> None:
    ours, theirs = [1.0, 1.4, 0.9, 1.2], [0.8, 1.1, 1.0, 0.7]
    within = paired([a - b for a, b in zip(ours, theirs, strict=True)])
    assert 2 * within.above(0.0) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-12)
    between = unpaired(ours, theirs)
    assert 2 * between.above(0.0) == pytest.approx(stats.ttest_ind(ours, theirs).pvalue, rel=1e-12)
    assert between.half_width() == pytest.approx(
        stats.ttest_ind(ours, theirs).confidence_interval().high - between.mean, rel=1e-12
    )


def test_equivalence_is_two_one_sided_tests() -> None:
    values = [0.02, -0.01, 0.03, 0.00]
    found = paired(values)
    above = stats.ttest_1samp(values, -0.05, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.05, alternative="less").pvalue
    assert found.within(0.05) == pytest.approx(max(above, below), rel=1e-12)
    assert found.beyond(0.05) == 1.0
    assert Estimate(1.0, 0.1, 5).beyond(0.5) == pytest.approx(2 * stats.t.sf(5.0, 5), rel=1e-12)


def test_without_spread_a_difference_is_certain_and_one_value_is_unknown() -> None:
    assert paired([2.0, 2.0]).above(0.0) == 0.0 and paired([2.0, 2.0]).below(0.0) == 1.0
    assert math.isnan(paired([2.0]).above(0.0)) and math.isnan(unpaired([1.0], [2.0]).error)
    assert math.isnan(paired([]).mean)


def test_moderation_weighs_by_degrees_of_freedom() -> None:
    assert Prior(2.0, 4.0).moderated(5.0, 2.0) == (3.0, 6.0)
    assert NOTHING_KNOWN.moderated(5.0, 2.0) == (5.0, 2.0)
    assert Prior(2.0, 4.0).moderated(math.nan, 0) == (2.0, 4.0)
    assert Prior(2.0, math.inf).moderated(5.0, 2.0) == (2.0, math.inf)


def test_the_prior_of_many_variances_is_found_again() -> None:
    """Variances drawn as the model says: s0^2 = 3, d0 = 6."""
    rng = np.random.default_rng(0)
    true = 3.0 * 6 / rng.chisquare(6, 4000)
    found = fit_prior(list(true * rng.chisquare(2, 4000) / 2), [2] * 4000)
    assert found.variance == pytest.approx(3.0, rel=0.05) and found.df == pytest.approx(6.0, rel=0.15)


def test_equal_variances_are_pooled_with_no_more_weight_than_they_have() -> None:
    found = fit_prior([2.0, 2.0, 2.0, 2.0], [3, 3, 3, 3])
    # e^(mean of log s^2 - digamma(1.5) + log(1.5)), digamma(1.5) = 0.03648997
    assert found == Prior(pytest.approx(2.0 * 1.5 * math.exp(-0.03648997), rel=1e-6), 12.0)
    assert fit_prior([2.0, 0.0, 3.0], [2, 2, 2]) == NOTHING_KNOWN


def test_rates_of_false_discoveries() -> None:
    assert false_discovery_rates([0.01, math.nan, 0.04, 0.03]) == [
        pytest.approx(0.03), pytest.approx(math.nan, nan_ok=True), pytest.approx(0.04), pytest.approx(0.04)
    ]  # fmt: skip
    assert false_discovery_rates([]) == []


def test_power_is_that_of_the_t_test() -> None:
    """Against the noncentral t, and the textbook's 17 per group for an effect of one sd at 80%."""
    assert power(1.0, math.sqrt(2 / 17), 32) == pytest.approx(0.8070, abs=2e-4)
    assert power(0.0, 1.0, 10) == pytest.approx(0.025, abs=1e-6)
    assert math.isnan(power(1.0, math.nan, 3))


def test_average_power_without_a_prior_spread_is_that_of_the_t_test() -> None:
    """Known variance: the normal's; a prior as heavy as a t test's own degrees of freedom: found by drawing."""
    known = Prior(2.0, math.inf)
    assert average_power(1.5, known, 4, 3) == pytest.approx(stats.norm.sf(1.959964 - 1.5 / math.sqrt(2 / 3)), abs=1e-6)
    rng, prior = np.random.default_rng(0), Prior(2.0, 5.0)
    true = 10.0 / rng.chisquare(5, 200_000)
    moderated = (10.0 + 4 * true * rng.chisquare(4, 200_000) / 4) / 9
    drawn = 2.5 + rng.standard_normal(200_000) * np.sqrt(true / 3)
    found = np.mean(drawn / np.sqrt(moderated / 3) > stats.t.ppf(0.975, 9))
    assert average_power(2.5, prior, 4, 3) == pytest.approx(found, abs=0.004)


def test_a_ratio_of_estimates_has_fiellers_interval() -> None:
    """A denominator without error gives the plain interval; one near zero gives no bound."""
    top, fixed = Estimate(2.0, 0.1, 4), Estimate(4.0, 0.0, math.inf)
    half = stats.t.ppf(0.975, 4) * 0.1 / 4
    assert ratio_interval(top, fixed) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert ratio_interval(top, Estimate(0.1, 0.2, 4)) == (-math.inf, math.inf)
    # Solves (top - r bottom)^2 = t^2 (v11 - 2 r v12 + r^2 v22)
    bottom, covariance = Estimate(4.0, 0.3, 9), 0.01
    t = stats.t.ppf(0.975, 4)
    for r in ratio_interval(top, bottom, covariance):
        assert (2.0 - r * 4.0) ** 2 == pytest.approx(t**2 * (0.01 - 2 * r * covariance + r**2 * 0.09), rel=1e-9)


def test_rows_are_paired_where_seeds_have_much_in_common() -> None:
    """t(8 + 2) sqrt(1 - correlation) against t(8 + 4): 2.2281 sqrt(1 - 0.0437) = 2.1788."""
    assert not Spread(20, 1.0, 8.0, 0.0436).pairs_by_seed(3)
    assert Spread(20, 1.0, 8.0, 0.0438).pairs_by_seed(3)
    assert spread.UNKNOWN.pairs_by_seed(3)


@pytest.mark.parametrize("correlation", [0.0, 0.25, 0.9])
def test_the_tests_keep_their_level_and_find_planted_effects(correlation: float) -> None:
    """1,000 times three seeds of a row and of its copy, judged with the spread that other rows gave."""
    rng = np.random.default_rng(1)

    def rows(count: int, n: int) -> np.ndarray:
        """Values (count, 2, n) of pairs of rows, whose seeds have ``correlation`` in common."""
        sd = np.sqrt(8 / rng.chisquare(8, (count, 1, 1)))
        shared, own = rng.standard_normal((count, 1, n)), rng.standard_normal((count, 2, n))
        return sd * (math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own)

    pool = [tuple(dict(enumerate(row)) for row in pair) for pair in rows(200, 3)]
    borrowed = spread_of([pair[0] for pair in pool], pool)
    effect = detectable(borrowed, 3)
    different = found = 0
    for ours, theirs in rows(1000, 3):
        for planted in (0.0, effect):
            estimate = borrowed.estimate(dict(enumerate(ours + planted)), dict(enumerate(theirs)))
            decided = 2 * min(estimate.above(0.0), estimate.below(0.0)) <= 0.05
            different += decided and planted == 0.0
            found += decided and planted > 0.0
    assert different <= 60  # 50 expected at most, with its own scatter of 7
    assert found >= 800
