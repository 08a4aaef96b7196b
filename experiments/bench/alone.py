"""Measurements in processes of their own, and two settings in turn."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from core.config import UserError

ROUNDS = 2  # of processes, for each of two settings that are compared


def alone(words: Sequence[str]) -> str:
    """Output of this benchmark in a process of its own."""
    command = [sys.executable, "-m", "experiments.cli", "bench", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        how = f"exit code {done.returncode}"
        if done.returncode < 0:  # the system ends who takes too much memory, who then cannot say so
            how = f"ended by {signal.Signals(-done.returncode).name}"
        said = done.stderr.strip().splitlines()[-1:]
        raise UserError(": ".join([" ".join(words), how, *said]))
    return done.stdout


def versus(words: Sequence[str], others: Sequence[str], repeats: int, stage: float) -> dict[str, Any]:
    """Images/s and peak GB of both settings, and the second's over the first's: medians of processes in turn."""
    settings = {"first": list(words), "second": [*words, *others]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.json"
        for _ in range(ROUNDS):
            for name, setting in settings.items():
                alone([*setting, "--repeats", str(repeats), "--stage", str(stage), "--out", str(file)])
                found[name].append(json.loads(file.read_text()))
    keys = ("images_per_s", "peak_gb")
    medians = {name: {key: median(one[key] for one in runs) for key in keys} for name, runs in found.items()}
    ratio = {key: medians["second"][key] / medians["first"][key] for key in keys}
    facts = {key: found["first"][0][key] for key in ("experiment", "device")}
    return {**facts, "versus": " ".join(others), **medians, "ratio": ratio}
