"""Which times are trained and sampled: trailing grids, pi(t) of Flash Diffusion (Eq. 7), stages of a budget.

An index counts a K-step grid from full noise down: index 0 is full noise, index i has K - i solver steps
left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PMF_KINDS = ("mixture", "uniform", "gaussian", "sharp")


def trailing_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> np.ndarray:
    """Trailing spacing, int64 (K,): round(T - i T/K) - 1, so K=4 of T=1000 is 999, 749, 499, 249."""
    assert 0 < num_steps <= num_train_timesteps, (num_steps, num_train_timesteps)
    index = np.arange(num_steps)
    return np.round(num_train_timesteps - index * (num_train_timesteps / num_steps)).astype(np.int64) - 1


def timestep_pmf(
    kind: str, num_timesteps: int, stage_weights: Sequence[float], mixture_variance: float = 0.5
) -> np.ndarray:
    """pi(t) over the indices of a K-step grid, float64 (K,), sums to 1.

    ``stage_weights`` are the mixture's beta at (full, 3/4, 1/2, 1/4) noise, that is indices 0, K/4, K/2,
    3K/4. ``mixture``: Eq. 7, Gaussian modes of ``mixture_variance`` squared index steps (0.5 in the paper),
    truncated to the grid and normalised as a whole: the mode at full noise has only its right half.
    ``sharp``: the same modes without width. ``uniform``: all indices alike. ``gaussian``: centred on t = 0.5;
    the paper gives no width, its release has variance K/2 in index units.
    """
    assert kind in PMF_KINDS and num_timesteps % 4 == 0 and len(stage_weights) == 4
    index = np.arange(num_timesteps)
    modes = np.arange(4) * (num_timesteps // 4)
    distance = (index[:, None] - modes).astype(np.float64)
    if kind == "mixture":
        mass = np.exp(-(distance**2) / (2 * mixture_variance)) @ np.asarray(stage_weights, dtype=np.float64)
    elif kind == "sharp":
        mass = (distance == 0) @ np.asarray(stage_weights, dtype=np.float64)
    elif kind == "gaussian":
        mass = np.exp(-((index - num_timesteps / 2) ** 2) / num_timesteps)
    else:
        mass = np.ones(num_timesteps)
    return mass / mass.sum()


def stage_at(fraction: float, num_stages: int) -> int:
    """Stage of the budget's ``fraction``: stages are equal parts, the last one includes the end.

    The small constant keeps a boundary such as 0.29 of 100 stages from rounding into the stage before.
    """
    return min(int(fraction * num_stages + 1e-9), num_stages - 1)
