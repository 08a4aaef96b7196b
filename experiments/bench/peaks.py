"""The peak of what one process holds with adapters and with copies, each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import compose, resolve
from experiments.bench.alone import alone
from experiments.bench.step import build
from experiments.bench.timing import held_gb, peak_gb
from experiments.build import device_of, source_of
from experiments.memory import GB, planned_bytes

MEMORY = [
    "dmd2/tiny", "backbone.path=random:sd-50m", "backbone.lora_rank=16", "backbone.lora_alpha=16", "train.batch_size=2",
    "execution.activation_checkpointing=true",
]  # fmt: skip


def peak_of_two_iterations(words: Sequence[str]) -> float:
    """GB that a training takes beside what the process held before it was built."""
    config = resolve(compose(words[0], words[1:]))
    before = held_gb() if device_of(config).type == "cpu" else 0.0
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(config, Path(folder))
        trainer._iteration()
        trainer._iteration()
    return peak_gb(trainer.method.backbone.device) - before


def compare_memory(words: Sequence[str]) -> dict[str, Any]:
    """Peak GB by ``backbone.sharing``, each measured in a process of its own, beside what ``plan-memory`` says."""
    found: dict[str, dict[str, float]] = {}
    for sharing in ("lora", "full"):
        setting = [*words, f"backbone.sharing={sharing}"]
        config = compose(setting[0], setting[1:])
        config.backbone.path = source_of(config)
        found[sharing] = {
            "measured_gb": float(alone(["--peak", *setting]).split()[-1]),
            "planned_gb": planned_bytes(config, 1)[1] / GB,
        }
    ratio = {key: found["lora"][key] / found["full"][key] for key in found["lora"]}
    return found | {"ratio": ratio}
