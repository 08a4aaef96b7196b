"""Judging in chunks: reference features are computed once, kept, and rebuilt when damaged."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from core.catalogue import CLIP_SCORE, DIVERSITY, FD_EFFNET, KD_EFFNET, METRICS
from core.data.requests import Requests
from core.metrics.fid import frechet_distance, kernel_distance, load_extractor
from core.metrics.measure import FORMULAS, Judges, Reference, value_of

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)


def _judges(tmp_path: Path) -> Judges:
    loaders = {"effnet": lambda: load_extractor("effnet"), "clip": lambda: pytest.fail("nobody asked CLIP")}
    return Judges(loaders, tmp_path)


def _reference(reads: list[int]) -> Reference:
    def images() -> Iterator[np.ndarray]:
        reads.append(1)
        return iter(IMAGES)

    return Reference("r0", len(IMAGES), images)


def test_every_metric_has_its_formula_and_none_is_left_over() -> None:
    assert {metric.estimator for metric in METRICS.values()} == set(FORMULAS)


def test_values_come_from_features_and_references(tmp_path: Path) -> None:
    judges = _judges(tmp_path)
    generated = judges.network("effnet").outputs(255 - IMAGES[:50], Requests(("x",) * 50))
    reference = judges.reference_features("effnet", _reference([]))
    np.testing.assert_allclose(reference, judges.network("effnet").outputs(IMAGES, Requests(())), atol=1e-5)
    assert value_of(KD_EFFNET, generated, reference) == kernel_distance(generated, reference)
    assert value_of(FD_EFFNET, generated, reference) == frechet_distance(generated, reference)
    assert value_of(CLIP_SCORE, np.array([0.25, 0.75])) == 0.5
    same, orthogonal = np.ones((2, 3)), np.eye(3)[:2]
    assert value_of(DIVERSITY, np.stack([same, orthogonal])) == pytest.approx(0.5)


def test_reference_features_are_read_once_per_set_and_network(tmp_path: Path) -> None:
    reads: list[int] = []
    first = _judges(tmp_path).reference_features("effnet", _reference(reads))
    second = _judges(tmp_path).reference_features("effnet", _reference(reads))
    assert len(reads) == 1
    np.testing.assert_array_equal(first, second)
    (file,) = (tmp_path / "reference").glob("*.npy")
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(_judges(tmp_path).reference_features("effnet", _reference(reads)), first)
    assert len(reads) == 2, "damaged features are computed again"


def test_images_of_different_shapes_are_judged(tmp_path: Path) -> None:
    photographs = [IMAGES[0], IMAGES[1], IMAGES[2, :20], IMAGES[3]]
    features = _judges(tmp_path).reference_features("effnet", Reference("r1", 4, lambda: photographs))
    alone = _judges(tmp_path).network("effnet").outputs(IMAGES[3:4], Requests(()))
    np.testing.assert_allclose(features[3:], alone, atol=1e-5)
