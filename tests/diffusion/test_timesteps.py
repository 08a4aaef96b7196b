"""pi(t) against the computed tables of the method's notes, trailing grids and stages."""

from __future__ import annotations

import numpy as np
import pytest

from core.diffusion.timesteps import stage_at, timestep_pmf, trailing_timesteps

STAGES = ([0, 0, 0.5, 0.5], [0.1, 0.3, 0.3, 0.3], [0.25] * 4, [0.4, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("variance", "first", "first_four", "expected_steps"),
    [
        (0.5, (0, 0.0577, 0.1492, 0.2472), (0, 0.0799, 0.2068, 0.3427), (12.00, 17.26, 19.25, 21.38)),
        (0.25, (0, 0.0795, 0.2020, 0.3287), (0, 0.0903, 0.2294, 0.3732), (12.00, 17.43, 19.64, 21.93)),
    ],
    ids=["paper", "release"],
)
def test_mixture_reproduces_the_computed_tables(variance, first, first_four, expected_steps) -> None:
    pmfs = [timestep_pmf("mixture", 32, weights, variance) for weights in STAGES]
    np.testing.assert_allclose([pmf.sum() for pmf in pmfs], 1)
    np.testing.assert_allclose([pmf[0] for pmf in pmfs], first, atol=5e-5)
    np.testing.assert_allclose([pmf[:4].sum() for pmf in pmfs], first_four, atol=5e-5)
    steps = 32 - np.arange(32)
    np.testing.assert_allclose([pmf @ steps for pmf in pmfs], expected_steps, atol=5e-3)


def test_the_alternatives_of_the_ablation() -> None:
    np.testing.assert_array_equal(timestep_pmf("uniform", 16, STAGES[3]), np.full(16, 1 / 16))
    sharp = timestep_pmf("sharp", 16, STAGES[3])
    np.testing.assert_allclose(sharp[[0, 4, 8, 12]], STAGES[3])
    assert np.count_nonzero(sharp) == 4
    gaussian = timestep_pmf("gaussian", 32, STAGES[3])
    assert gaussian.argmax() == 16
    np.testing.assert_allclose(gaussian[16 - 4] / gaussian[16], np.exp(-(4**2) / 32))
    np.testing.assert_allclose(gaussian[1:16], gaussian[:16:-1])


def test_trailing_grids_are_those_of_the_papers() -> None:
    assert trailing_timesteps(1).tolist() == [999]
    assert trailing_timesteps(2).tolist() == [999, 499]
    assert trailing_timesteps(4).tolist() == [999, 749, 499, 249]
    grid = trailing_timesteps(32)
    assert grid.dtype == np.int64 and grid[0] == 999 and grid[-1] == 30
    assert grid[[8, 16, 24]].tolist() == [749, 499, 249]
    np.testing.assert_array_equal(trailing_timesteps(1000), np.arange(999, -1, -1))


def test_stages_are_equal_parts_and_the_last_includes_the_end() -> None:
    assert [stage_at(f, 4) for f in (0, 0.2499, 0.25, 0.5, 0.75, 0.9999, 1.0)] == [0, 0, 1, 2, 3, 3, 3]
    assert [stage_at(i / 100, 100) for i in range(100)] == list(range(100))
