"""A tiny real world for tests: a random Stable-Diffusion-class pipeline, a few latents, and trainers on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from core.backbones.roles import Sharing
from core.backbones.tiny import write_tiny_sd
from core.backbones.unet import UNetBackbone
from core.config import ExperimentConfig, compose
from core.data.batches import LatentData
from core.data.solutions import SolutionStore
from core.run import Run
from core.training.loop import Trainer
from experiments.build import METHODS, build_clock

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def backbone(folder: Path, sharing: str = "lora") -> UNetBackbone:
    return UNetBackbone.load(str(write_tiny_sd(folder / "tiny-sd")), Sharing(sharing, 4, 4, TARGETS))


def data(seed: int = 0, items: int = 24) -> LatentData:
    rng = np.random.default_rng(0)
    cache = SimpleNamespace(
        latents=rng.standard_normal((items, 4, 8, 8)).astype(np.float16),
        caption_index=np.arange(items) % 5,
        cond={"text": rng.standard_normal((5, 16, 16)).astype(np.float16)},
        content_hash="synthetic",
    )
    return LatentData(cache, seed)


def config(folder: Path, *overrides: str, sharing: str = "lora", experiment: str = "flash/tiny") -> ExperimentConfig:
    defaults = [f"execution.runs_dir={folder}/runs", f"backbone.sharing={sharing}", "execution.log_every_images=4"]
    out = compose(experiment, [*defaults, "method.student_lr=1e-3", "method.critic_lr=1e-3", *overrides])
    out.backbone.weights_hash, out.data.data_hash = "tiny", "synthetic"
    return out


def trainer(
    folder: Path,
    overrides: Sequence[str] = (),
    sharing: str = "lora",
    solutions: SolutionStore | None = None,
    experiment: str = "flash/tiny",
) -> Trainer:
    """A trainer of a method on the tiny pipeline, resumed from its run folder when there is a state."""
    settings = config(folder, *overrides, sharing=sharing, experiment=experiment)
    run = Run.create(settings)
    method = METHODS[settings.method.name](
        settings.method,
        backbone(folder, sharing),
        settings.seed,
        ema=settings.train.ema_decay > 0,
        solutions=solutions,
    )
    return Trainer(settings, method, data(settings.seed), run, build_clock(settings), run.begin_attempt())


def parameters(trained: Trainer) -> dict[str, Tensor]:
    """Everything that training may change, by player, cloned."""
    return {
        f"{name}/{key}": value.detach().clone()
        for name, player in trained.players.items()
        for key, value in (*player.parameters.items(), *((f"ema/{k}", v) for k, v in player.ema.items()))
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
