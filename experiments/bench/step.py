"""The cost of a training step: images per second, evaluations, efficiency and peak memory."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from core.backbones.base import Backbone
from core.config import ExperimentConfig, resolve
from core.data.batches import LatentData
from core.data.cache import LatentCache
from core.run import Run
from core.training.loop import Trainer
from experiments.bench.recorder import Recorder
from experiments.bench.timing import device_name, peak_gb, timed
from experiments.build import build_backbone, build_clock, build_method, device_of

ITEMS = 64


def noise_data(backbone: Backbone, config: ExperimentConfig) -> LatentData:
    """Latents of noise, and the conditioning of a few prompts."""
    rng = np.random.default_rng(0)
    prompts = ["", "red apple", "blue heart", "a dog"]
    cond = {name: value.cpu().numpy() for name, value in backbone.encode_text(prompts).tensors.items()}
    latents = rng.standard_normal((ITEMS, *backbone.latent_shape), dtype=np.float32)
    cache = LatentCache(latents, np.arange(ITEMS) % len(prompts), prompts, cond, ["noise"] * ITEMS, "noise")
    return LatentData(cache, config.seed, device_of(config))


def build(config: ExperimentConfig, folder: Path) -> Trainer:
    config.execution.runs_dir, config.execution.use_solution_store = str(folder), False
    config.train.budget.amount = 10**9  # it never ends
    backbone = build_backbone(config)
    method = build_method(config, backbone)
    run = Run.create(resolve(config))
    return Trainer(config, method, noise_data(backbone, config), run, build_clock(config), run.begin_attempt())


class Period:
    """One period of an experiment's iterations, at a fraction ``stage`` of its budget, to be run again and again."""

    def __init__(self, config: ExperimentConfig, folder: Path, stage: float) -> None:
        self.trainer = build(config, folder)
        self.backbone, self.clock = self.trainer.method.backbone, self.trainer.clock
        self.clock.budget, self.clock.unit = 10**6, "iterations"
        self.recorder, self.length = Recorder(self.backbone), config.method.period
        self.start = int(stage * self.clock.budget) // self.length * self.length
        self.evaluations: Counter[str] = Counter()
        self.rewind()

    @property
    def images(self) -> int:
        """Images that a period trains on."""
        return self.length * self.clock.batch_size

    def positions(self) -> list[np.ndarray]:
        """Positions of the samples of each of the period's iterations."""
        first, size = self.start * self.clock.batch_size, self.clock.batch_size
        return [np.arange(first + size * number, first + size * (number + 1)) for number in range(self.length)]

    def choose(self, cost: Callable[[np.ndarray], np.ndarray], expected: float) -> None:
        """Move to the period, of the next hundred, in which a sample's mean ``cost`` is nearest to what is expected."""
        distance = {}
        for start in range(self.start, self.start + 100 * self.length, self.length):
            self.start = start
            distance[start] = abs(cost(np.concatenate(self.positions())).mean() - expected)
        self.start = min(distance, key=distance.__getitem__)
        self.rewind()

    def rewind(self) -> None:
        """Go back to the period's first iteration: the same samples, starts and noises come again."""
        self.clock.iteration, self.clock.images = self.start, self.start * self.clock.batch_size

    def run(self) -> None:
        """Train for the period, and note its evaluations."""
        self.rewind()
        before = Counter(self.backbone.evaluations)
        self.recorder.calls, self.recorder.on = [], True
        for _ in range(self.length):
            self.trainer._iteration()
        self.recorder.on = False
        self.evaluations = self.backbone.evaluations - before


def measure(config: ExperimentConfig, repeats: int, stage: float) -> dict[str, Any]:
    """Images/s, evaluations an image by role, efficiency and peak memory, after one period to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        period = Period(config, Path(folder), stage)
        device = period.backbone.device
        steps, networks = [], []
        for repeat in range(repeats + 1):
            seconds, alone = timed(period.run, device), timed(period.recorder.replay, device)
            if repeat:
                steps.append(seconds)
                networks.append(alone)
    return {
        "experiment": config.name,
        "device": device_name(device),
        "batch_size": config.train.batch_size,
        "images_per_s": period.images / median(steps),
        "evaluations_per_image": per_image(period.evaluations, period.images),
        "efficiency": median(n / s for n, s in zip(networks, steps, strict=True)),
        "peak_gb": peak_gb(device),
    }


def per_image(evaluations: Counter[str], images: int) -> dict[str, float]:
    """Evaluations an image by role."""
    return {role: count / images for role, count in sorted(evaluations.items())}
