"""Results that several trainings in one process need, computed by the first that asks for them.

Cells of a grid with one teacher, seed and data pose it the same problems: whatever depends on these alone (a solution
of its ODE, its features of a picture) is a pure function of the settings that the asking method names and of the
sample's position. A result is kept until all trainings have passed its position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Rows(Protocol):
    """One result for each position, kept somewhere."""

    def has(self, positions: np.ndarray) -> bool:
        """Whether all of ``positions`` are kept."""

    def fetch(self, positions: np.ndarray, compute: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """Rows of ``positions``, and whether all were kept; what is missing is computed together."""


class MemoryRows:
    """``Rows`` on the device where they were computed."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def has(self, positions: np.ndarray) -> bool:
        return all(position in self._kept for position in positions.tolist())

    def fetch(self, positions: np.ndarray, compute: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """See ``Rows``; a row that is kept stays as it is, since others have used it."""
        there = self.has(positions)
        if not there:
            for position, row in zip(positions.tolist(), compute(), strict=True):
                self._kept.setdefault(position, row)
        return torch.stack([self._kept[position] for position in positions.tolist()]), there

    def forget(self, before: int) -> None:
        """Let go of the rows at positions below ``before``."""
        for position in [position for position in self._kept if position < before]:
            del self._kept[position]

    def __len__(self) -> int:
        return len(self._kept)


class Memory:
    """The rows of one group of trainings, by what they are and by the settings that decide them."""

    def __init__(self) -> None:
        self._rows: dict[tuple[object, ...], MemoryRows] = {}

    def rows(self, *key: object) -> MemoryRows:
        """The rows of this key; at first there are none."""
        return self._rows.setdefault(key, MemoryRows())

    def forget(self, before: int) -> None:
        """Let go of all rows at positions below ``before``, which every training has passed."""
        for rows in self._rows.values():
            rows.forget(before)

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))
