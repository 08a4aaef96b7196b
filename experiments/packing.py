"""Which runs can be trained in one process on one frozen base, and the file that names them. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.config import ExperimentConfig, UserError, compose, resolve
from core.identity import identity_dict, teacher_identity
from core.run import atomic_write

OWN = ("lora_rank", "lora_alpha")  # of a cell's adapters


@dataclass(frozen=True)
class Entry:
    """One run of a pack: what ``fewstep train`` would be told, and the file that its lines go to beside its own log."""

    experiment: str
    overrides: tuple[str, ...]
    log: str = ""

    def config(self) -> ExperimentConfig:
        """Its resolved configuration; UserError for a mistake."""
        return resolve(compose(self.experiment, self.overrides))


def base_of(config: ExperimentConfig) -> dict[str, Any]:
    """Everything by key in which the runs of one pack agree: the base, what it is shown, and how it is executed.

    Methods, losses, schedules, rates, batch sizes, budgets and the size of adapters are each run's own.
    """
    network = {key: value for key, value in identity_dict(config.backbone).items() if key not in OWN}
    execution = ("device", "sharding", "activation_checkpointing", "compile", "cache_dir", "num_threads")
    stored = {"train.state_dtype": config.train.state_dtype} if config.backbone.sharing == "full" else {}
    return {
        **{f"backbone.{key}": value for key, value in network.items()},
        **{f"data.{key}": value for key, value in identity_dict(config.data).items()},
        "backbone.path": config.backbone.path,
        "backbone.revision": config.backbone.revision,
        "data.path": config.data.path,
        "task": identity_dict(config.task),
        "train.precision": config.train.precision,
        "train.parent": teacher_identity(config).get("parent"),
        **stored,
        **{f"execution.{key}": getattr(config.execution, key) for key in execution},
    }


def may_be_packed(config: ExperimentConfig) -> bool:
    """Whether a run trains, in one process, as those of a pack do."""
    return config.method.trains and config.execution.sharding == "none"


def check_base(configs: Sequence[ExperimentConfig]) -> None:
    """UserError unless all may be trained on one base; it names the first key in which they differ."""
    for config in configs:
        if not config.method.trains:
            raise UserError(f"{config.name} trains nothing; a pack trains its runs")
        if config.execution.sharding != "none":
            raise UserError(
                f"execution.sharding={config.execution.sharding}: a pack trains in one process; allowed: none"
            )
    first, *others = map(base_of, configs)
    for other in others:
        for key in {**first, **other}:  # in this order, whatever the process
            if first.get(key) != other.get(key):
                values = f"{first.get(key)} and {other.get(key)}"
                raise UserError(f"{key} is {values} in one pack; runs that share a base agree in it")


def write_pack(folder: Path, entries: Sequence[Entry]) -> Path:
    """A file that names the runs of a pack; it is called like its content."""
    text = json.dumps([asdict(entry) for entry in entries], indent=1) + "\n"
    file = folder / f"{hashlib.blake2b(text.encode(), digest_size=5).hexdigest()}.json"
    atomic_write(file, text)
    return file


def read_pack(file: Path) -> list[Entry]:
    """The runs that a file names; UserError where it cannot be read."""
    try:
        found = json.loads(file.read_text())
        return [Entry(entry["experiment"], tuple(entry["overrides"]), entry["log"]) for entry in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a file of a pack ({error})") from error
