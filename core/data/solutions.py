"""Teacher solutions, solved once and shared by every cell that asks the same problems.

Solving the teacher's ODE is most of Flash Diffusion's cost. Draws are keyed, so cells of a grid that differ only
downstream of the teacher pose identical problems: problem p of a store is a pure function of the store's key (teacher,
data, seed, K, pi(t), guidance, solver, number of samples, where stages begin). The file is memory-mapped; a row is read
only once its flag is set, and the flag is set after the row. Using the store is execution, never identity.

Two processes that need the same rows do not both solve them: the rows' bytes of the flag file are locked (fcntl), and
the second is told that they are ``Busy``. The trainer then solves rows that lie ahead instead of waiting.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import UserError


class Busy(Exception):  # noqa: N818  not an error: another process is solving these rows
    """Another process is solving these rows; ask again later."""


class SolutionStore:
    """Rows (C, H, W) float32 by global position; ``key`` is every fact the solutions depend on."""

    def __init__(self, root: Path, key: dict[str, Any], num_rows: int, shape: tuple[int, ...]) -> None:
        text = json.dumps(key, sort_keys=True)
        self.path = Path(root) / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "key.json").write_text(text)
            self._size(self.path / "rows.f32", num_rows * int(np.prod(shape)) * 4)
            self._size(self.path / "flags.u8", num_rows)
        except OSError as error:
            raise UserError(
                f"execution.cache_dir: cannot keep teacher solutions in {self.path}: {error.strerror}"
            ) from error
        self.rows = np.memmap(self.path / "rows.f32", dtype=np.float32, mode="r+", shape=(num_rows, *shape))
        self.flags = np.memmap(self.path / "flags.u8", dtype=np.uint8, mode="r+", shape=(num_rows,))
        self.read = 0  # rows served without a solve, over the life of this object

    @staticmethod
    def _size(path: Path, size: int) -> None:
        with open(path, "ab") as file:  # sparse: grows to its size at once, disk is taken row by row
            if file.tell() != size:
                file.truncate(size)

    def has(self, positions: np.ndarray) -> bool:
        """Whether all rows of ``positions`` are stored."""
        return bool(self.flags[positions].all())

    @contextmanager
    def _locked(self, start: int, count: int) -> Iterator[None]:
        with open(self.path / "flags.u8", "r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, start)
            except (BlockingIOError, PermissionError) as error:
                raise Busy from error
            try:
                yield
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN, count, start)

    def fetch(self, positions: np.ndarray, compute: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """Rows of consecutive ``positions``, and whether all were stored; missing rows are solved together, or Busy.

        The floating-point result of a solve depends on what shares its batch. So a row that is there stays as it is
        (a run with another batch size has used it), and what is returned is what a resumed run will read.
        """
        start, count = int(positions[0]), len(positions)
        assert np.array_equal(positions, np.arange(start, start + count)), "positions must be consecutive"
        if not self.has(positions):
            with self._locked(start, count):
                if not self.has(positions):
                    solved, missing = compute(), positions[self.flags[positions] == 0]
                    self.rows[missing] = solved.float().cpu().numpy()[missing - start]
                    self.flags[missing] = 1
                    return torch.from_numpy(self.rows[start : start + count]).to(solved, copy=True), False
        self.read += count
        return torch.from_numpy(self.rows[start : start + count].copy()), True
