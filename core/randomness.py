"""Keyed random streams: every draw is a pure function of (seed, player, purpose, position).

No generator state exists, so nothing has to be saved: resume is exact, a run does not depend on world size,
micro-batch or accumulation, and adding or removing a loss term moves nobody else's noise. The key is a BLAKE2b
hash of the whole tuple, so that neighbouring seeds or ranks never share a stream (``seed + rank`` does).
The generator is Philox, a counter-based one: about 10 us per 8x8 latent on a CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def _digest(*key: object) -> int:
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest(), "little")


def _generator(*key: object) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_digest(*key)))


def torch_seed(*key: object) -> int:
    """A seed for ``torch.manual_seed`` from a key: for initialising modules, never for training draws."""
    return _digest("init", *key) % 2**63


@dataclass(frozen=True)
class Stream:
    """The draws of one ``player`` for one ``purpose``; ``position`` is the global index of the sample drawn."""

    seed: int
    player: str
    purpose: str

    def generator(self, position: int) -> np.random.Generator:
        return _generator(self.seed, self.player, self.purpose, int(position))

    def normal(self, positions: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """Standard normal, float32 (len(positions), *shape)."""
        shape = tuple(shape)
        out = np.empty((len(positions), *shape), dtype=np.float32)
        for row, position in zip(out, positions, strict=True):
            row[...] = self.generator(position).standard_normal(shape, dtype=np.float32)
        return out

    def uniform(self, positions: Sequence[int], low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Uniform on [low, high), float64 (len(positions),)."""
        return np.array([low + (high - low) * self.generator(p).random() for p in positions], dtype=np.float64)

    def integers(self, positions: Sequence[int], low: int, high: int) -> np.ndarray:
        """Uniform integers in [low, high), int64 (len(positions),)."""
        return np.array([self.generator(p).integers(low, high) for p in positions], dtype=np.int64)

    def choice(self, positions: Sequence[int], pmf: np.ndarray) -> np.ndarray:
        """Indices drawn from ``pmf`` by inverse transform, int64 (len(positions),).

        One uniform per draw: two pmfs that agree up to an index agree on every draw below it.
        """
        cdf = np.cumsum(np.asarray(pmf, dtype=np.float64))
        index = np.searchsorted(cdf, self.uniform(positions) * cdf[-1], side="right")
        return np.minimum(index, len(cdf) - 1).astype(np.int64)


def permutation(seed: int, purpose: str, size: int, epoch: int) -> np.ndarray:
    """Keyed permutation of range(size) for one epoch, int64 (size,)."""
    return _generator(seed, "data", purpose, epoch).permutation(size).astype(np.int64)
