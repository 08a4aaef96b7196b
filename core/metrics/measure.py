"""From images to values: which judge each metric asks, what it compares with, and how a number is formed.

Images are judged in chunks as they are made, so thirty thousand large ones never lie in memory together. What
a judge leaves behind per image is one cosine (``clip``) or a feature vector (the others)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from core.metrics import clip, diversity, fid


@dataclass(frozen=True)
class Metric:
    """``value(generated, reference)`` on the judge's outputs; ``grouped``: several images of one prompt."""

    judge: str
    estimator: str
    value: Callable[[np.ndarray, np.ndarray | None], float]
    needs_reference: bool = False
    grouped: bool = False


METRICS = {
    "kd_effnet": Metric("effnet", fid.KERNEL_ESTIMATOR, fid.kernel_distance, needs_reference=True),
    "fd_effnet": Metric("effnet", fid.FRECHET_ESTIMATOR, fid.frechet_distance, needs_reference=True),
    "kd_teacher": Metric("teacher", fid.KERNEL_ESTIMATOR, fid.kernel_distance, needs_reference=True),
    "kid": Metric("inception", fid.KERNEL_ESTIMATOR, fid.kernel_distance, needs_reference=True),
    "fid": Metric("inception", fid.FRECHET_ESTIMATOR, fid.frechet_distance, needs_reference=True),
    "clip_score": Metric("clip", clip.ESTIMATOR, lambda cosines, _: float(cosines.mean())),
    "diversity": Metric(
        "effnet",
        diversity.ESTIMATOR,
        lambda features, _: float(diversity.prompt_diversity(features).mean()),
        grouped=True,
    ),
}


@dataclass(frozen=True)
class Reference:
    """Real images of one split. ``hash`` covers what they are; they are rendered only when features are
    missing."""

    hash: str
    count: int
    images: Callable[[], Iterable[np.ndarray]]


class Judges:
    """The judging networks, each loaded at first use, and the cached features of reference sets."""

    def __init__(
        self,
        load_clip: Callable[[], clip.ClipJudge],
        load_teacher: Callable[[], fid.Extractor],
        cache_dir: Path,
        device: str = "cpu",
        effnet_path: str | None = None,
        inception_path: str | None = None,
    ) -> None:
        self._load_clip, self._load_teacher = load_clip, load_teacher
        self._cache_dir, self._device = cache_dir, device
        self._effnet_path, self._inception_path = effnet_path, inception_path

    @cached_property
    def clip(self) -> clip.ClipJudge:
        return self._load_clip()

    @cached_property
    def teacher(self) -> fid.Extractor:
        return self._load_teacher()

    @cached_property
    def effnet(self) -> fid.Extractor:
        return fid.load_extractor("effnet", self._effnet_path, self._device)

    @cached_property
    def inception(self) -> fid.Extractor:
        return fid.load_extractor("inception", self._inception_path, self._device)

    def identity(self, judge: str) -> fid.Extractor | clip.ClipJudge:
        """Name, hash and resize of a judge."""
        return getattr(self, judge)

    def outputs(self, judge: str, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """What ``judge`` says of each image: features (N, D), or the cosine with its prompt (N,)."""
        if judge == "clip":
            return self.clip.similarities(images, prompts)
        return getattr(self, judge)(images)

    def reference_features(self, judge: str, reference: Reference) -> np.ndarray:
        """Features (count, D) of real images, computed once per (images, network) and kept on disk."""
        extractor: fid.Extractor = getattr(self, judge)
        key = "\x1f".join((reference.hash, str(reference.count), extractor.hash, extractor.resize))
        path = self._cache_dir / "reference" / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.npy"
        features = _read(path, (reference.count, extractor.dim))
        if features is None:
            features = np.concatenate([extractor(chunk) for chunk in _chunks(reference.images(), 64)])
            _write(path, features)
        return features


def _chunks(images: Iterable[np.ndarray], size: int) -> Iterable[np.ndarray]:
    """Stacks of up to ``size`` consecutive images of one shape (a user's photographs differ in shape)."""
    held: list[np.ndarray] = []
    for image in images:
        if held and (len(held) == size or image.shape != held[0].shape):
            yield np.stack(held)
            held = []
        held.append(image)
    if held:
        yield np.stack(held)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Cached features, or None when they are absent or damaged."""
    try:
        features = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return features if features.shape == shape else None


def _write(path: Path, features: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, features)
    os.replace(file.name, path)
