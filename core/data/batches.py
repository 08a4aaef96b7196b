"""Batches from a latent cache in a keyed order: sample p of a run is a pure function of (seed, p)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from core.backbones.base import Cond
from core.data.cache import LatentCache
from core.randomness import permutation


@dataclass(frozen=True)
class Batch:
    """``positions``: global sample indices (B,); ``x0``: latents (B, C, H, W); ``null``: that of the empty prompt.

    ``texts``: the captions that ``cond`` encodes.
    """

    positions: np.ndarray
    x0: Tensor
    cond: Cond
    null: Cond
    texts: Sequence[str] = ()

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size`` samples; the order is kept."""
        assert len(self.positions) % size == 0
        starts = range(0, len(self.positions), size)
        return [self._part(slice(i, i + size)) for i in starts]

    def _part(self, rows: slice) -> Batch:
        return Batch(self.positions[rows], self.x0[rows], self.cond[rows], self.null, self.texts[rows])


class LatentData:
    """Reads a memory-mapped cache in epochs, each a keyed permutation of all items."""

    def __init__(self, cache: LatentCache, seed: int, device: torch.device | str = "cpu") -> None:
        self.cache, self.seed, self.device = cache, seed, torch.device(device)
        self.null = self._cond(cache.cond, np.zeros(1, dtype=np.int64)).to(self.device)
        self._being_read: dict[
            tuple[int, ...], Future[tuple[Tensor, Cond, list[str]]]
        ] = {}  # at most one batch, by its positions

    @property
    def content_hash(self) -> str:
        return self.cache.content_hash

    @lru_cache(maxsize=2)  # noqa: B019  one instance lives as long as its run
    def _order(self, epoch: int) -> np.ndarray:
        return permutation(self.seed, "order", len(self.cache.latents), epoch)

    def items(self, positions: np.ndarray) -> np.ndarray:
        """Cache items of global positions, int64 (B,)."""
        size = len(self.cache.latents)
        return np.array([self._order(int(p) // size)[int(p) % size] for p in positions], dtype=np.int64)

    @cached_property
    def _reader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    def batch(self, positions: np.ndarray, following: np.ndarray | None = None) -> Batch:
        """The samples at ``positions``; those at ``following`` are read meanwhile, for the next call."""
        being_read = self._being_read.pop(tuple(positions), None)
        x0, cond, texts = self._read(positions) if being_read is None else being_read.result()
        if following is not None:
            self._being_read = {tuple(following): self._reader.submit(self._read, following)}
        x0, cond = x0.to(self.device, non_blocking=True), cond.to(self.device)
        return Batch(positions, x0, cond, self.null, texts)

    def _read(self, positions: np.ndarray) -> tuple[Tensor, Cond, list[str]]:
        """Latents, conditions and captions on the host, in memory from which a GPU can copy while it computes."""
        items = self.items(positions)
        x0 = self._on_host(self.cache.latents[items])
        rows = np.asarray(self.cache.caption_index[items], dtype=np.int64)
        cond = self._cond(self.cache.cond, rows).also(self._cond(self.cache.item_cond, items).tensors)
        return x0, cond, [self.cache.captions[row] for row in rows]

    def _cond(self, arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> Cond:
        return Cond({name: self._on_host(values[rows]) for name, values in arrays.items()})

    def _on_host(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.asarray(values, dtype=np.float32))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
