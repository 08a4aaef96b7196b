"""The store of teacher solutions between processes."""

import sys
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch

from core.data.solutions import Busy, SolutionStore


def test_rows_that_another_process_solves_are_busy(tmp_path: Path) -> None:
    script = (
        "import sys, torch, numpy as np; from pathlib import Path; from core.data.solutions import SolutionStore\n"
        "def compute():\n"
        "    print('solving', flush=True); sys.stdin.readline(); return torch.ones(4, 1)\n"
        f"SolutionStore(Path({str(tmp_path)!r}), {{}}, 8, (1,)).fetch(np.arange(4), compute)\n"
    )
    store = SolutionStore(tmp_path, {}, 8, (1,))
    with Popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "solving\n"
        with pytest.raises(Busy):
            store.fetch(np.arange(4), lambda: torch.zeros(4, 1))
        rows, stored = store.fetch(np.arange(4, 8), lambda: torch.full((4, 1), 2.0))
        assert not stored and rows.tolist() == [[2.0]] * 4
        other.communicate("\n")
    assert store.fetch(np.arange(4), lambda: torch.zeros(4, 1))[0].tolist() == [[1.0]] * 4


def test_a_row_that_is_there_stays(tmp_path: Path) -> None:
    """A run with smaller batches has used it; what a larger batch gets is what it will read when it resumes."""
    store = SolutionStore(tmp_path, {}, 8, (1,))
    store.fetch(np.arange(2, 4), lambda: torch.ones(2, 1))
    rows, stored = store.fetch(np.arange(4), lambda: torch.full((4, 1), 2.0))
    assert not stored and rows.flatten().tolist() == [2, 2, 1, 1]
    assert store.fetch(np.arange(4), lambda: torch.zeros(4, 1))[0].equal(rows)
