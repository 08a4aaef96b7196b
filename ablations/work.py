"""The work on a cell: its run is trained, or measured; the command that does it, and its environment. Torch-free.

A grid on this machine and a grid on a cluster start the same commands.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ablations.grid import Cell
from ablations.status import Status
from core.config import own_file, to_yaml
from core.overrides import split
from core.run import atomic_write

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


def next_work(status: Status) -> Work:
    """The work that comes next: a training, or a measurement of a run that is trained already or never is."""
    trains = status.state != "trained" and status.cell.config.method.trains
    return Work(TRAIN if trains else EVALUATE, status.cell)


def job_root(runs_dir: Path) -> Path:
    """The folder of all that is kept of jobs: their logs, code, and submissions."""
    return Path(runs_dir).resolve() / ".slurm"


def job_environment(threads: int) -> dict[str, str]:
    """Variables of a job's environment that let it use ``threads`` processors and print no progress bars."""
    return {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}


def train_command(cell: Cell, runs_dir: Path, threads: int, *, evaluate: bool = True) -> list[str]:
    """The command that trains one cell; it exits with 0 at once when everything is done already."""
    return _command(cell, "experiments.train", ["--evaluate"] if evaluate else [], runs_dir, threads)


def evaluate_command(cell: Cell, runs_dir: Path, threads: int) -> list[str]:
    """The command that measures what a trained cell lacks; it fails when the training is not done."""
    return _command(cell, "experiments.evaluate", ["--finished"], runs_dir, threads)


def pack_command(file: Path) -> list[str]:
    """The command that trains the runs that ``file`` names in one process, and measures them."""
    return [sys.executable, "-m", "experiments.pack", str(file), "--evaluate"]


def _command(cell: Cell, module: str, options: list[str], runs_dir: Path, threads: int) -> list[str]:
    return [sys.executable, "-m", module, *options, *train_words(cell, runs_dir, threads)]


def train_words(cell: Cell, runs_dir: Path, threads: int) -> list[str]:
    """The experiment of a cell, and all overrides of its run on this machine."""
    experiment, overrides = _frozen(cell, runs_dir)
    return [experiment, *overrides, f'execution.runs_dir="{runs_dir}"', f"execution.num_threads={threads}"]


def _frozen(cell: Cell, runs_dir: Path) -> tuple[str, Sequence[str]]:
    """Experiment and overrides of a cell's command; a copy of a user's own file, which may change while a job waits."""
    own = own_file(cell.experiment)
    if own is None:
        return cell.experiment, cell.overrides
    file = job_root(runs_dir) / "experiments" / Work(EVALUATE, cell).key / own.name
    atomic_write(file, to_yaml(cell.config))
    groups, _ = split(cell.overrides)  # chosen in the copy
    return str(file), [text for text in cell.overrides if text not in groups]
