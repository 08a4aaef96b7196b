"""Measuring pictures: the formula behind each estimator, the judging networks, and features of real images.

Pictures are judged in chunks as they are made, so thirty thousand large ones never lie in memory together. What a judge
leaves behind for each picture is one number (``clip``) or a feature vector (the others).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from core.catalogue import FRECHET, KERNEL, MEAN_COSINE, PAIRWISE_DISTANCE, Metric
from core.data.requests import Requests
from core.metrics import diversity, fid

Formula = Callable[[np.ndarray, np.ndarray | None], float]
"""A judge's outputs for generated pictures, and for real ones where the metric needs them, to a value.

Outputs are (N, ...); of a grouped metric (prompts, pictures of a prompt, ...).
"""

FORMULAS: dict[str, Formula] = {}


def register_formula(estimator: str, formula: Formula) -> None:
    """Make ``formula`` the computation of every metric of the catalogue with this estimator."""
    assert estimator not in FORMULAS, estimator
    FORMULAS[estimator] = formula


def value_of(metric: Metric, generated: np.ndarray, real: np.ndarray | None = None) -> float:
    """The metric's value from what its judge said of generated and real pictures."""
    return FORMULAS[metric.estimator](generated, real)


def _mean(outputs: np.ndarray, real: None) -> float:
    return float(outputs.mean())


def _mean_diversity(features: np.ndarray, real: None) -> float:
    return float(diversity.prompt_diversity(features).mean())


register_formula(KERNEL, fid.kernel_distance)
register_formula(FRECHET, fid.frechet_distance)
register_formula(MEAN_COSINE, _mean)
register_formula(PAIRWISE_DISTANCE, _mean_diversity)


class JudgingNetwork(Protocol):
    """A loaded judge: what identifies it in a protocol, and what it says of pictures uint8 (N, H, W, 3)."""

    name: str
    hash: str
    resize: str

    def outputs(self, images: np.ndarray, requests: Requests) -> np.ndarray:
        """One number (N,) or one feature vector (N, D) for each picture; real images have no requests."""


@dataclass(frozen=True)
class Reference:
    """Real images of one split. ``hash`` covers what they are; they are rendered only when features are missing."""

    hash: str
    count: int
    images: Callable[[], Iterable[np.ndarray]]


class Judges:
    """The judging networks by name, each loaded at first use, and the cached features of reference sets."""

    def __init__(self, loaders: Mapping[str, Callable[[], JudgingNetwork]], cache_dir: Path) -> None:
        self._loaders, self._cache_dir = loaders, cache_dir
        self._loaded: dict[str, JudgingNetwork] = {}
        self._real: dict[Path, np.ndarray] = {}

    def network(self, judge: str) -> JudgingNetwork:
        """The network of this name, loaded now unless it was before."""
        if judge not in self._loaded:
            self._loaded[judge] = self._loaders[judge]()
        return self._loaded[judge]

    def reference_features(self, judge: str, reference: Reference) -> np.ndarray:
        """Features (count, D) of real images, once per (images, network) and kept on disk; read only."""
        network = self.network(judge)
        key = "\x1f".join((reference.hash, str(reference.count), network.hash, network.resize))
        path = self._cache_dir / "reference" / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.npy"
        if path not in self._real:
            self._real[path] = self._features_of(network, reference, path)
            self._real[path].flags.writeable = False  # what is computed of them once holds as long as they do
        return self._real[path]

    def _features_of(self, network: JudgingNetwork, reference: Reference, path: Path) -> np.ndarray:
        features = _read(path, reference.count)
        if features is None:
            chunks = [network.outputs(chunk, Requests(())) for chunk in _chunks(reference.images(), 64)]
            features = np.concatenate(chunks)
            _write(path, features)
        return features


def _chunks(images: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Stacks of up to ``size`` consecutive images of one shape (a user's photographs differ in shape)."""
    held: list[np.ndarray] = []
    for image in images:
        if held and (len(held) == size or image.shape != held[0].shape):
            yield np.stack(held)
            held = []
        held.append(image)
    if held:
        yield np.stack(held)


def _read(path: Path, count: int) -> np.ndarray | None:
    """Cached features of ``count`` images, or None when they are absent or damaged."""
    try:
        features = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return features if len(features) == count else None


def _write(path: Path, features: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, features)
    os.replace(file.name, path)
