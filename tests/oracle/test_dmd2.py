"""DMD2 as it is trained, on a Gaussian: a generator x = m + F z against a target whose scores are exact.

With a fake score that is exactly the generator's the generator reaches the target. With one that has to follow it by
denoising, the ratio of their updates decides: the claim of the two time scales in miniature.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.backbones.base import FAKE_SCORE, STUDENT, TEACHER, Cond
from core.backbones.gaussian import GaussianBackbone, GaussianMixture, frechet_distance
from core.config import compose
from core.data.batches import LatentData
from core.data.cache import LatentCache
from core.diffusion.process import FlowProcess
from core.methods.dmd2 import Dmd2
from core.run import Run
from core.training.loop import Trainer
from experiments.build import build_clock
from tests import worlds

SHAPE, DIM = (3, 1, 2), 6


class Generator(GaussianBackbone):
    """The student maps noise to m + F z; every other role is the exact denoiser of its own Gaussian."""

    device = torch.device("cpu")

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if role != STUDENT:
            return super().network(role, x_t, t, Cond({"components": cond.tensors["components"].bool()}))
        mixture = self.roles[STUDENT]
        return (mixture.means + x_t.double().flatten(1) @ mixture.factors[0].mT).view_as(x_t).to(x_t.dtype)


class Tracked(Dmd2):
    """The fake score is the generator's own, exactly, whenever it is read."""

    def rollout(self, batch, clock):
        worlds.copy_role(self.backbone, STUDENT, FAKE_SCORE)
        return super().rollout(batch, clock)


def gaussian(seed: int) -> GaussianMixture:
    random = np.random.default_rng(seed)
    factor = 0.2 * random.standard_normal((1, DIM, DIM)) + 0.6 * np.eye(DIM)
    return GaussianMixture(torch.from_numpy(random.standard_normal((1, DIM))), torch.from_numpy(factor))


def distances(folder: Path, method: type[Dmd2], *overrides: str) -> list[float]:
    """Squared Frechet distance of the generator from the target after every tenth of the training, the start first."""
    options = [
        "method.num_steps=1", "method.gan=off", "method.guidance=1", "method.weight_decay=0", "train.batch_size=32",
        "train.max_grad_norm=100", f"execution.runs_dir={folder}", "execution.log_every_images=10000",
        "execution.checkpoint_every_images=100000", *overrides,
    ]  # fmt: skip
    config = compose("dmd2/tiny", options)
    config.backbone.weights_hash, config.data.data_hash = "oracle", "oracle"
    backbone = Generator(gaussian(0), FlowProcess(), "x0", SHAPE)
    other = gaussian(1)
    trained = method(config.method, backbone, seed=0)
    for role in (STUDENT, FAKE_SCORE):  # both start away from the target
        for name, parameter in backbone.role_parameters(role).items():
            parameter.data.copy_(dict(other.named_parameters())[name])
    latents, cond = np.zeros((32, *SHAPE), np.float32), {"components": np.ones((1, 1), bool)}
    cache = LatentCache(latents, np.zeros(32, np.int64), [""], cond, [""] * 32, "oracle")
    data = LatentData(cache, 0)
    run = Run.create(config)
    trainer = Trainer(config, trained, data, run, build_clock(config), run.begin_attempt())
    out = [distance(backbone)]
    for part in range(1, 11):
        trainer.train(until=part / 10)
        out.append(distance(backbone))
    return out


def distance(backbone: Generator) -> float:
    a, b = (backbone.role_parameters(role) for role in (STUDENT, TEACHER))
    with torch.no_grad():
        return frechet_distance(a["means"][0], a["factors"][0], b["means"][0], b["factors"][0]).item()


def test_with_an_exact_fake_score_the_generator_reaches_the_target(tmp_path: Path) -> None:
    found = distances(
        tmp_path, Tracked, "train.budget.amount=100", "method.ttur=1", "method.student_lr=0.03", "train.batch_size=16"
    )
    assert found == sorted(found, reverse=True) and found[-1] < 0.01 * found[0]


def test_a_fake_score_that_follows_needs_more_updates_than_the_generator(tmp_path: Path) -> None:
    """Both at one learning rate, equal iterations: 1:1 circles around the target for ever, 5:1 goes to it."""
    both = ["train.budget.amount=250", "method.student_lr=0.05", "method.fake_score_lr=0.05", "train.batch_size=16"]
    equal, two_time_scales = (distances(tmp_path / r, Dmd2, f"method.ttur={r}", *both) for r in "15")
    assert min(equal[3:]) > 0.1 * equal[0] and max(equal[3:]) > 1.5 * min(equal[3:])
    assert two_time_scales[-1] < 0.03 * two_time_scales[0]
