"""Tests of a difference of two rows: Student's t with moderated variances, equivalence, and many tests at once.

A variance of three seeds is hardly known. Rows of the same kind (a method on a teacher, a metric, a split, an NFE) have
variances of a similar size, so each is drawn towards their common value, with the weight that the spread of all of them
allows (Smyth 2004, Linear Models and Empirical Bayes Methods, section 3 and 6.2): the test keeps its level and finds
more. Equivalence is two one-sided tests (Schuirmann 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = 200
POWER = 0.8  # of the plans of seeds
LEVEL = 0.05  # of a two-sided test of a difference, and of each one-sided test of equivalence


@dataclass(frozen=True)
class Estimate:
    """A difference with its standard error and the degrees of freedom of that; nan where nothing is known."""

    mean: float
    error: float
    df: float

    def below(self, bound: float) -> float:
        """The one-sided p value of "the difference is below ``bound``"."""
        from scipy.special import stdtr  # a third of a second of import that tables do not need

        if math.isnan(self.error) or math.isnan(bound):
            return math.nan
        if self.error == 0.0:
            return 0.0 if self.mean < bound else 1.0
        return float(stdtr(min(self.df, 1e9), (self.mean - bound) / self.error))

    def above(self, bound: float) -> float:
        """The one-sided p value of "the difference is above ``bound``"."""
        return Estimate(-self.mean, self.error, self.df).below(-bound)

    def within(self, bound: float) -> float:
        """The p value of "the difference is between -``bound`` and ``bound``", by two one-sided tests."""
        return max(self.below(bound), self.above(-bound))

    def beyond(self, bound: float) -> float:
        """The two-sided p value of "the difference is outside of -``bound`` to ``bound``"."""
        return min(1.0, 2.0 * min(self.above(bound), self.below(-bound)))

    def half_width(self, confidence: float = 1 - LEVEL) -> float:
        """Half the width of the difference's interval; nan where no error is known."""
        return t_quantile(0.5 + confidence / 2, self.df) * self.error


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def t_quantile(probability: float, df: float) -> float:
    """The quantile of Student's t; ``df`` may be infinite."""
    from scipy.special import stdtrit

    return float(stdtrit(min(df, 1e9), probability))


@dataclass(frozen=True)
class Prior:
    """Knowledge of a variance before it is measured: as if ``df`` degrees of freedom had shown ``variance``."""

    variance: float
    df: float

    def moderated(self, variance: float, df: float) -> tuple[float, float]:
        """The variance ``variance`` of ``df`` degrees of freedom, drawn towards the prior; its degrees of freedom."""
        if self.df == 0 or df == 0:
            return (self.variance, self.df) if df == 0 else (variance, df)
        if math.isinf(self.df):
            return self.variance, math.inf
        return (self.df * self.variance + df * variance) / (self.df + df), self.df + df


NOTHING_KNOWN = Prior(math.nan, 0.0)


def fit_prior(variances: Sequence[float], dfs: Sequence[float]) -> Prior:
    """The prior of variances of one kind, each of its own degrees of freedom, by the moments of their logarithms.

    Its degrees of freedom are at most those that all variances have together. Fewer than three variances above zero
    say nothing of their spread: the prior has no weight then.
    """
    from scipy.special import digamma, polygamma

    known = [(variance, df) for variance, df in zip(variances, dfs, strict=True) if variance > 0 and df > 0]
    if len(known) < 3:
        return NOTHING_KNOWN
    half = np.array([df for _, df in known]) / 2
    logs = np.log([variance for variance, _ in known]) - digamma(half) + np.log(half)
    spread = float(np.var(logs, ddof=1) - polygamma(1, half).mean())
    most = float(2 * half.sum())
    if spread <= 0:
        return Prior(float(np.exp(logs.mean())), most)
    weight = _inverse_trigamma(spread)
    return Prior(float(np.exp(logs.mean() + digamma(weight) - math.log(weight))), min(2 * weight, most))


def _inverse_trigamma(value: float) -> float:
    """x > 0 with trigamma(x) = ``value``."""
    from scipy.optimize import brentq
    from scipy.special import polygamma

    return float(brentq(lambda x: float(polygamma(1, x)) - value, 1e-8, 1e8, xtol=1e-12, rtol=1e-12))


def paired(differences: Sequence[float], prior: Prior = NOTHING_KNOWN) -> Estimate:
    """The mean of differences within seeds; ``prior`` is that of their variance."""
    n = len(differences)
    if n == 0:
        return UNKNOWN
    spread, df = prior.moderated(variance(differences), n - 1)
    return Estimate(float(np.mean(differences)), math.sqrt(spread / n), df)


def unpaired(ours: Sequence[float], theirs: Sequence[float], prior: Prior = NOTHING_KNOWN) -> Estimate:
    """The difference of two means of values of one variance; ``prior`` is that of this variance."""
    n, m = len(ours), len(theirs)
    if n == 0 or m == 0:
        return UNKNOWN
    squares = [(len(values) - 1) * variance(values) for values in (ours, theirs) if len(values) > 1]
    own_df = n + m - 2
    spread, df = prior.moderated(sum(squares) / own_df if own_df else math.nan, own_df)
    return Estimate(float(np.mean(ours) - np.mean(theirs)), math.sqrt(spread * (1 / n + 1 / m)), df)


def variance(values: Sequence[float]) -> float:
    """The sample variance; nan of a single value."""
    return float(np.var(values, ddof=1)) if len(values) > 1 else math.nan


def power(effect: float, error: float, df: float, level: float = LEVEL) -> float:
    """The probability that a two-sided t test of ``level`` finds a difference of ``effect`` on its own side."""
    from scipy.special import nctdtr

    if math.isnan(error) or math.isnan(effect) or df <= 0:
        return math.nan
    if error == 0.0:
        return 1.0 if effect else level / 2
    df = min(df, 1e6)
    return 1.0 - float(nctdtr(df, abs(effect) / error, t_quantile(1 - level / 2, df)))


def average_power(effect: float, prior: Prior, own_df: float, values: float, level: float = LEVEL) -> float:
    """``power`` of a moderated test, on average over the variances that ``prior`` expects.

    The variance of the difference is that of a value over ``values``; the test sees it with ``own_df`` degrees of
    freedom of its own. Both chi-squares are integrated on their quantiles.
    """
    from scipy.special import chdtri, ndtr

    middle = (np.arange(QUANTILES) + 0.5) / QUANTILES
    weight = min(prior.df, 1e9)  # so heavy that it is all, and still a number
    true = weight * prior.variance / chdtri(weight, middle)
    seen = true[:, None] * chdtri(own_df, middle)[None] / own_df
    moderated = (weight * prior.variance + own_df * seen) / (weight + own_df)
    t = t_quantile(1 - level / 2, prior.df + own_df)
    return float(ndtr((abs(effect) - t * np.sqrt(moderated / values)) / np.sqrt(true[:, None] / values)).mean())


def false_discovery_rates(p_values: Sequence[float]) -> list[float]:
    """The q value of each test among all of them (Benjamini & Hochberg 1995); nan stays nan and is not counted."""
    from scipy.stats import false_discovery_control

    known = [place for place, p in enumerate(p_values) if not math.isnan(p)]
    out = [math.nan] * len(p_values)
    if known:
        adjusted = false_discovery_control([p_values[place] for place in known])
        for place, q in zip(known, adjusted, strict=True):
            out[place] = float(q)
    return out


def ratio_interval(
    top: Estimate, bottom: Estimate, covariance: float = 0.0, confidence: float = 1 - LEVEL
) -> tuple[float, float]:
    """The interval of top / bottom (Fieller 1954); ``covariance`` is that of the two means.

    It is all numbers where ``bottom`` cannot be told from zero.
    """
    t = t_quantile(0.5 + confidence / 2, min(top.df, bottom.df))
    ratio, g = top.mean / bottom.mean, (t * bottom.error / bottom.mean) ** 2
    if not g < 1:
        return -math.inf, math.inf
    shared = covariance / bottom.error**2 if bottom.error else 0.0
    inner = (
        top.error**2 - 2 * ratio * covariance + (ratio * bottom.error) ** 2 - g * (top.error**2 - shared * covariance)
    )
    middle, half = ratio - g * shared, t / abs(bottom.mean) * math.sqrt(max(inner, 0.0))
    return (middle - half) / (1 - g), (middle + half) / (1 - g)
