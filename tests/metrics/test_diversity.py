"""Diversity within a prompt, from arrangements whose distances are known."""

import numpy as np
import pytest

from core.metrics.diversity import prompt_diversity


def test_known_arrangements() -> None:
    same = np.tile([1.0, 2.0, 3.0], (3, 1))
    orthogonal = np.eye(3) * np.array([[1.0], [5.0], [0.1]])  # lengths do not matter
    mixed = np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])  # pairs: 0, 1, 1
    opposite = np.array([[1.0, 0, 0], [-1, 0, 0], [1, 0, 0]])  # pairs: 2, 0, 2
    values = prompt_diversity(np.stack([same, orthogonal, mixed, opposite]))
    np.testing.assert_allclose(values, [0.0, 1.0, 2 / 3, 4 / 3], atol=1e-12)


def test_expectation_does_not_depend_on_the_number_of_images() -> None:
    features = np.random.default_rng(0).normal(size=(4000, 8, 5)) + 0.5
    assert prompt_diversity(features[:, :2]).mean() == pytest.approx(prompt_diversity(features).mean(), abs=0.02)


def test_one_image_has_no_diversity() -> None:
    with pytest.raises(AssertionError, match="at least two"):
        prompt_diversity(np.ones((3, 1, 4)))
