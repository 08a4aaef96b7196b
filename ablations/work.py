"""The work on a cell: its run is trained, or measured; the command that does it, and its environment. Torch-free.

A grid on this machine and a grid on a cluster start the same commands.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from ablations.grid import Cell

TRAIN, EVALUATE = "train", "evaluate"  # kinds of work
# By default glibc maps and unmaps every large tensor anew; the page faults took half of the processor's time on a
# virtual machine. Other systems ignore these names.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


@dataclass(frozen=True)
class Work:
    """One training of a cell's run, or one measurement as the cell asks for it.

    A cell that trains nothing (a teacher) is only measured.
    """

    kind: str
    cell: Cell

    @property
    def key(self) -> str:
        """The run's id; of a measurement also what is measured: several cells may share a run."""
        if self.kind == TRAIN:
            return self.cell.id
        return f"{self.cell.id}-{hashlib.blake2b(self.cell.key.encode(), digest_size=4).hexdigest()}"


def job_environment(threads: int) -> dict[str, str]:
    """Variables of a job's environment that let it use ``threads`` processors and print no progress bars."""
    return {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}


def train_command(cell: Cell, runs_dir: Path, threads: int, *, evaluate: bool = True) -> list[str]:
    """The command that trains one cell; it exits with 0 at once when everything is done already."""
    return _command(cell, "experiments.train", ["--evaluate"] if evaluate else [], runs_dir, threads)


def evaluate_command(cell: Cell, runs_dir: Path, threads: int) -> list[str]:
    """The command that measures what a trained cell lacks; it fails when the training is not done."""
    return _command(cell, "experiments.evaluate", ["--finished"], runs_dir, threads)


def _command(cell: Cell, module: str, options: list[str], runs_dir: Path, threads: int) -> list[str]:
    command = [sys.executable, "-m", module, *options, cell.experiment, *cell.overrides]
    return [*command, f'execution.runs_dir="{runs_dir}"', f"execution.num_threads={threads}"]
