"""Diversity: how far apart images of one prompt are, in the features of a judging network."""

from __future__ import annotations

import numpy as np


def prompt_diversity(features: np.ndarray) -> np.ndarray:
    """Mean pairwise cosine distance of each prompt's images: features (P, k, D) with k >= 2 -> float64 (P,).

    It is 0 where all images of a prompt coincide. Only pairs of different images count, so its expectation does not
    depend on k.
    """
    k = features.shape[1]
    assert k >= 2, "diversity needs at least two images per prompt"
    unit = features.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    similarity = np.einsum("pid,pjd->pij", unit, unit)
    off_diagonal = similarity.sum(axis=(1, 2)) - np.trace(similarity, axis1=1, axis2=2)
    return 1.0 - off_diagonal / (k * (k - 1))
