"""Time and disk that the missing part of a grid will take, from finished runs of the same experiments. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from ablations.grid import Cell
from ablations.status import budget_images
from core.config import ExperimentConfig
from core.identity import teacher_problem
from core.metrics.cost import training_cost
from core.run import Run, find_runs

RUNS_READ = 20  # of an experiment: enough for a median
MOST_LATENT_CHANNELS, LATENT_STRIDE = 16, 8  # of the autoencoders in use


@dataclass(frozen=True)
class Estimate:
    """Time and disk that trainings take. ``unknown``: experiments without a finished run to estimate from."""

    device_hours: float = 0.0
    runs_bytes: float = 0.0
    solutions_bytes: float = 0.0  # at most: with as many latent channels as any autoencoder in use has
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"about {self.device_hours:.2g} device-hours, {size_text(self.runs_bytes)} of runs"]
        if self.unknown:
            parts = [f"no finished run of {', '.join(self.unknown)} tells how long it takes"]
        if self.solutions_bytes:
            parts.append(f"at most {size_text(self.solutions_bytes)} of teacher solutions")
        return ", ".join(parts)


def estimate(cells: Sequence[Cell], runs_dir: Path) -> Estimate:
    """Device-hours and bytes that training ``cells`` will take."""
    trained = _trained_runs(cells)
    names = sorted({config.name for config in trained.values()})
    medians = {name: _medians(runs_dir, name) for name in names}
    hours = size = 0.0
    for config in trained.values():
        known = medians[config.name]
        if known is not None:
            hours += known[0] * budget_images(config)
            size += known[1]
    unknown = tuple(name for name in names if medians[name] is None)
    return Estimate(hours, size, _solutions_bytes(trained.values()), unknown)


def _trained_runs(cells: Iterable[Cell]) -> dict[str, ExperimentConfig]:
    """Configurations by id, without those that train nothing."""
    return {cell.id: cell.config for cell in cells if cell.config.method.trains}


def _solutions_bytes(configs: Iterable[ExperimentConfig]) -> float:
    """Bytes of all teacher solutions; runs whose teacher solves the same problems share theirs."""
    distinct = {}
    for config in configs:
        problem = teacher_problem(config)
        if problem is not None:
            distinct[json.dumps(problem, sort_keys=True)] = config
    return sum(budget_images(config) * _latent_bytes(config) for config in distinct.values())


def _medians(runs_dir: Path, name: str) -> tuple[float, float] | None:
    """Device-hours per image and bytes of a folder, over finished runs of an experiment; None: none has finished."""
    found = _measured(runs_dir, name)
    if not found:
        return None
    hours, sizes = zip(*found, strict=True)
    return median(hours), median(sizes)


def _measured(runs_dir: Path, name: str) -> list[tuple[float, int]]:
    """(device-hours per image, bytes of the folder) of finished runs."""
    done = (run for path in find_runs(runs_dir / name) if (run := Run.open(path)).state() == "done")
    out = []
    for run in islice(done, RUNS_READ):
        cost = training_cost(run.metrics())
        if cost.images:
            size = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
            out.append((cost.device_hours / cost.images, size))
    return out


def _latent_bytes(config: ExperimentConfig) -> int:
    """Bytes of one stored solution, fp32."""
    return 4 * MOST_LATENT_CHANNELS * (config.data.image_size // LATENT_STRIDE) ** 2


def size_text(count: float) -> str:
    """A number of bytes as text: ``1.5 GB``."""
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"
