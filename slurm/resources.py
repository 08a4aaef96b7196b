"""Resources that a job asks for (resources.yaml), and the micro-batch that fits without changing the global batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import yaml

from ablations.work import EVALUATE, Work
from core.schema import UserError, check_choice
from slurm.profile import Profile

FILE = Path(__file__).parent / "resources.yaml"


@dataclass(frozen=True)
class Resources:
    """The resources of one job. Runs with equal resources form arrays."""

    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_process: int = 0
    cpus_per_process: int = 1
    mem_gb: int = 4  # per node
    max_micro_batch: int | None = None  # samples of one forward on one device; null: all
    cells_per_job: int = 1  # runs that share a job and its devices
    pack: int = 1  # runs that train in one process on one base, at most
    packed_gb: int = 1  # memory of each further run of a pack: its adapters and their moments
    disk_gb: float = 0.1  # of one run: checkpoints, snapshots, samples

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def gpus_per_node(self) -> int:
        return self.processes_per_node * self.gpus_per_process

    @property
    def job_gb(self) -> int:
        """Memory of a whole job on each node."""
        return self.mem_gb * self.cells_per_job + self.packed_gb * (self.pack - 1)

    def __str__(self) -> str:
        keys = ["nodes", "processes_per_node", "gpus_per_process", "cpus_per_process", "mem_gb", "cells_per_job"]
        keys += ["pack"] if self.pack > 1 else []
        return " ".join(f"{key}={getattr(self, key)}" for key in keys)

    def check(self, profile: Profile, experiment: str) -> None:
        """Raise UserError when a node of the cluster does not hold this."""
        asked = {
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_node": self.processes_per_node * self.cpus_per_process,
            "mem_gb_per_node": self.mem_gb,
        }
        for key, value in asked.items():
            if value > getattr(profile, key):
                raise UserError(f"{experiment} needs {key}={value}; the cluster's profile has {getattr(profile, key)}")
        if self.cells_per_job > 1 and self.processes > 1:
            raise UserError(f"{experiment}: cells_per_job={self.cells_per_job} needs runs of one process")
        if self.pack > 1 and max(self.processes, self.cells_per_job) > 1:
            raise UserError(f"{experiment}: pack={self.pack} needs runs of one process, and one process in a job")


@cache
def _table() -> dict[str, dict]:
    return yaml.safe_load(FILE.read_text())


def resources_of(work: Work, **changes: object) -> Resources:
    """The resources of a job that trains a cell's run, or measures it; ``changes`` come from the command line.

    Measuring takes one process of what training takes, or what the experiment's ``evaluate`` says.
    """
    table = _table()
    experiment = work.cell.experiment
    own = {**table["default"], **table.get(experiment, {})}
    measuring = {"nodes": 1, "processes_per_node": 1, **own.pop("evaluate", {})}
    values = {**own, **(measuring if work.kind == EVALUATE else {})}
    values |= {key: value for key, value in changes.items() if value is not None}
    if work.kind == EVALUATE:
        values.pop("pack", None)
    known = [item.name for item in fields(Resources)]
    for key in values:
        check_choice(f"{FILE.name}: {experiment}", key, known)
    return Resources(**values)


def micro_batch(batch_size: int, resources: Resources) -> int | None:
    """The micro-batch: the largest part of a process's share that fits its device; None when the whole share fits.

    UserError when the processes do not divide the global batch, which is the run's identity and never adjusted.
    """
    if batch_size % resources.processes:
        raise UserError(f"{resources.processes} processes do not divide train.batch_size={batch_size}")
    share, most = batch_size // resources.processes, resources.max_micro_batch
    if most is None or share <= most:
        return None
    return max(size for size in range(1, most + 1) if share % size == 0)
