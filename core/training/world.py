"""The processes that train one run together. Global batch, draws and results do not depend on how many there are.

Every process draws its own share of an iteration's positions (all draws are keyed by position), averages gradients
with the others before clipping, and so holds the same parameters as they do. Only rank 0 writes files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from core.config import ExecutionConfig, ExperimentConfig, UserError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun and by ablations/job.py
TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 measures or builds a cache


def is_sharded(execution: ExecutionConfig, size: int) -> bool:
    """Whether each of ``size`` processes holds a part of the networks only."""
    return execution.sharding == "fsdp" and size > 1


def check_processes(config: ExperimentConfig, size: int) -> None:
    """UserError when ``size`` processes cannot train ``config`` as it is; it is never adjusted."""
    if size == 1:
        return
    if config.train.batch_size % size:
        raise UserError(f"{size} processes do not divide train.batch_size={config.train.batch_size}")
    measured_early = set(config.eval.at) - {1.0}
    if measured_early and is_sharded(config.execution, size):
        raise UserError(f"eval.at={config.eval.at}: sharded networks are measured at the end; allowed: [1.0]")
    if config.train.budget.unit == "evaluations":
        raise UserError("train.budget.unit=evaluations needs one process; allowed with several: images, iterations")


class World:
    """One process of ``size``; a world of one does nothing and costs nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.on_cuda = size > 1 and dist.get_backend() == "nccl"
        # Votes and counts live on the host; over nccl they would stop the device.
        self._host = dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None

    @classmethod
    def join(cls, device: torch.device) -> World:
        """The world that the launcher's environment names: nccl on CUDA, gloo elsewhere; alone without a launcher."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        missing = [name for name in LAUNCHER if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}; start it with torchrun"
            )
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, positions: np.ndarray) -> np.ndarray:
        """This process's consecutive part of an iteration's positions."""
        count = len(positions) // self.size
        return positions[self.rank * count : (self.rank + 1) * count]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their mean over the processes, in one message."""
        found = list(tensors)
        if self.size == 1 or not found:
            return
        flat = torch.cat([tensor.flatten() for tensor in found])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(found, flat.split([tensor.numel() for tensor in found]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether one process at least says so; all get the same answer."""
        if self.size == 1:
            return flag
        vote = torch.tensor([float(flag)])
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._host)
        return bool(vote.item())

    def total(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Sums over the processes; names that some processes lack count as zero there."""
        if self.size == 1:
            return dict(counts)
        gathered: list[Mapping[str, float]] = [{} for _ in range(self.size)]
        dist.all_gather_object(gathered, dict(counts), group=self._host)
        out: Counter[str] = Counter()
        for one in gathered:
            out.update(one)
        return dict(out)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self._host)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others: it makes the files that they then find.

        Locks are not enough: transformers saves a model only in the process of rank 0, whoever asks.
        """
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def leave(self) -> None:
        """Close the connection to the others."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()
