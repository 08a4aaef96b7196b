"""Compilation that pays for itself: decided by measuring this training on this machine.

``execution.compile=auto`` times a period of plain iterations and compiles the networks' blocks when what is left is
long enough: an hour, or, where a training of the same shape was compiled on this machine before, long enough for what
compiling took and saved then. What it takes and saves now is noted beside the compiled code in the cache, for the other
cells of a grid; where it saves nothing the blocks run plain again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from core.backbones.base import Backbone
from core.config import ExperimentConfig
from core.run import atomic_write
from core.training.world import ALONE, World

log = logging.getLogger("fewstep")
# Graphs of one block's code: by role, gradient mode, batch size and call. Beyond torch's own 8 a block runs uncompiled
VARIANTS = 64
TRIED_FROM_S = 3600.0  # what must be left where nothing is known: to compile a large network takes minutes
BACKEND = "inductor"  # of auto


@dataclass(frozen=True)
class Measured:
    """Seconds that compiling took, and the time of a compiled period over that of a plain one."""

    compile_s: float
    ratio: float

    def pays(self, remaining_s: float) -> bool:
        """Whether compiling saves more than it takes, where plain iterations would take ``remaining_s`` still."""
        return remaining_s * (1 - self.ratio) > self.compile_s


class Compiler:
    """Compiles as ``execution.compile`` says, and tells of what is compiled later; one for each training."""

    def __init__(self, config: ExperimentConfig, backbone: Backbone, world: World = ALONE) -> None:
        self._wanted, self._backbone, self._world = config.execution.compile, backbone, world
        self._length = config.method.period
        self._periods: list[float] = []  # seconds, since the last change
        self._so_far = 0  # iterations of the period that runs
        self._plain_s: float | None = None  # of a period, while compilation is being judged
        self._decided = self._wanted != "auto"
        self._graphs: int | None = None  # compiled until now, once all should be
        if self._wanted == "off":
            return
        folder = Path(config.execution.cache_dir) / "inductor"
        self._note = folder / f"{_shape(config)}.json"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute()))
        torch._dynamo.config.recompile_limit = VARIANTS
        if self._decided:
            backbone.compile_blocks(self._wanted)

    def after(self, seconds: float, fraction: float) -> None:
        """An iteration took ``seconds``, and ``fraction`` of the budget is spent."""
        if self._wanted == "off":
            return
        if self._so_far == 0:
            self._periods.append(0.0)
        self._periods[-1] += seconds
        self._so_far = (self._so_far + 1) % self._length
        if self._so_far or len(self._periods) < 2:  # the first period after a change makes what is made once
            return
        if not self._decided:
            self._decide(fraction)
        elif self._plain_s is not None:
            self._judge(self._plain_s)
        self._tell_of_new_graphs()

    def _decide(self, fraction: float) -> None:
        """Compile if that pays; processes of one training do the same."""
        self._decided, plain_s = True, self._periods[-1]
        done_s = sum(self._periods)
        remaining_s = done_s * (1 - fraction) / fraction if fraction else float("inf")
        known = self._known()
        pays = known.pays(remaining_s) if known is not None else remaining_s > TRIED_FROM_S
        if self._world.any(pays):
            log.info("compiling: plain iterations would take about %.0f s still", remaining_s)
            self._backbone.compile_blocks(BACKEND)
            self._periods, self._plain_s = [], plain_s

    def _judge(self, plain_s: float) -> None:
        """Note what compilation took and saves; run plain again where it saves nothing."""
        first_s, compiled_s = self._periods[0], self._periods[-1]
        found = Measured(max(0.0, first_s - compiled_s), compiled_s / plain_s)
        self._plain_s = None
        if self._world.is_main:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._note, json.dumps(asdict(found)).encode())
        log.info("compiled in %.0f s; an iteration takes %.2f of what it took", found.compile_s, found.ratio)
        if self._world.any(found.ratio >= 1):
            self._backbone.compile_blocks(None)

    def _known(self) -> Measured | None:
        """The note of a training of this shape on this machine."""
        if not self._note.exists():
            return None
        return Measured(**json.loads(self._note.read_text()))

    def _tell_of_new_graphs(self) -> None:
        now, before = graphs(), self._graphs
        if before is not None and now > before:
            log.warning(
                "compiled %d more graphs: batches of another size, or a network that is called anew", now - before
            )
        if self._plain_s is None:
            self._graphs = now


def graphs() -> int:
    """Graphs that this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _shape(config: ExperimentConfig) -> str:
    """Name of all that decides how long a training's graphs take to compile and to run, but for the machine."""
    backbone, execution = config.backbone, config.execution
    facts = [
        config.method.name, backbone.family, backbone.weights_hash, backbone.sharing, backbone.lora_rank,
        sorted(backbone.lora_targets), config.train.batch_size, execution.micro_batch, config.train.precision,
        execution.activation_checkpointing, execution.sharding, execution.device, torch.__version__,
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
