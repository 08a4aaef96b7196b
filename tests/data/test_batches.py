"""Batches that are read while the one before is used are those that are read at once."""

import numpy as np
import pytest
import torch

from core.data.batches import LatentData
from tests import worlds


def test_a_batch_that_was_read_ahead_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ahead, read = worlds.data(), worlds.data(), []
    reading = LatentData._read

    def noting(self: LatentData, positions: np.ndarray) -> object:
        read.append(positions.tolist())
        return reading(self, positions)

    expected = [plain.batch(np.arange(start, start + 4)) for start in (0, 4, 8)]
    monkeypatch.setattr(LatentData, "_read", noting)
    steps = [np.arange(start, start + 4) for start in (0, 4, 8, 12)]
    found = []
    for now, following in zip(steps[:3], steps[1:], strict=True):
        found.append(ahead.batch(now, following))
        ahead.batch(np.array([20, 21]))  # somebody else's do not disturb
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.x0, other.x0) and one.positions.tolist() == other.positions.tolist()
        assert torch.equal(one.cond.tensors["text"], other.cond.tensors["text"])
    ahead._reader.shutdown()
    assert sorted(read) == sorted([*(step.tolist() for step in steps), *[[20, 21]] * 3]), "each batch once"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_gpu_copies_lies_in_pinned_memory() -> None:
    x0, cond = worlds.data(device="cuda")._read(np.arange(4))
    assert x0.is_pinned() and cond.tensors["text"].is_pinned()
