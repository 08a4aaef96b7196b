"""Statistics over seeds: mean, standard deviation, Student t interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """``n`` values: their mean and sample standard deviation, and the t interval of the mean.

    One value has no spread: ``sd`` and ``half_width`` are nan then, and all three when ``n`` is 0.
    """

    mean: float
    sd: float
    n: int
    confidence: float = 0.95

    @property
    def half_width(self) -> float:
        """Half the width t_{n-1} sd / sqrt(n) of the mean's ``confidence`` interval."""
        return _half_width(self.sd, self.n, self.confidence) if self.n > 1 else math.nan


def summarize(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, sd (n - 1) and, by ``confidence``, the mean's interval."""
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n == 0:
        return Summary(math.nan, math.nan, 0, confidence)
    if n == 1:
        return Summary(float(data[0]), math.nan, 1, confidence)
    return Summary(float(data.mean()), float(data.std(ddof=1)), n, confidence)


def _half_width(sd: float, n: int, confidence: float) -> float:
    from scipy.special import stdtrit  # a third of a second of import that tables do not need

    return float(stdtrit(n - 1, 0.5 + confidence / 2)) * sd / math.sqrt(n)
