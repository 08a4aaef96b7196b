"""RL on a mixture of three modes, of which the reward likes one: the claim of the regulariser in miniature.

The student sends each noise to one of the teacher's modes, softly at the borders, and learns how much mass each gets.
Its fake score is exact: the teacher's modes with the student's masses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.backbones.base import FAKE_SCORE, STUDENT, TEACHER, Backbone, Cond
from core.backbones.gaussian import GaussianBackbone, GaussianMixture
from core.config import compose
from core.data.batches import LatentData
from core.data.cache import LatentCache
from core.diffusion.process import FlowProcess, Process, VPProcess
from core.methods.dmd2 import Dmd2
from core.rewards.base import Prompts, Reward
from core.rewards.known import KNOWN_REWARDS, KnownReward
from core.rewards.registry import REWARDS, register_reward
from core.run import Run
from core.sampler import Sampler
from core.training.loop import Trainer
from experiments.build import build_clock

SHAPE = (1, 1, 2)
ANGLES = 2 * torch.pi * torch.arange(3) / 3
MODES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1).double()
PROCESSES = {
    "vp": VPProcess.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "flow": FlowProcess(),
}


class Sender(GaussianBackbone):
    """The student's x0 is a mode, by where x_t lies; its ``log_weights`` widen and narrow the modes' parts."""

    device = torch.device("cpu")

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if role not in (STUDENT, "reference"):
            return super().network(role, x_t, t, Cond({"components": cond.tensors["components"].bool()}))
        student = self.roles[role]
        parts = (4 * x_t.double().flatten(1) @ MODES.T + student.log_weights).softmax(1)
        return (parts @ MODES).view_as(x_t).to(x_t.dtype)

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        own = super().role_parameters(role)
        return {"log_weights": own["log_weights"]} if role in (STUDENT, "reference") else own


class Tracked(Dmd2):
    """The fake score knows the masses of the student's samples, exactly but for the number of noises."""

    def rollout(self, batch, clock):
        if self.fake_role is not None:
            self.backbone.roles[FAKE_SCORE].log_weights.data.copy_(masses(self).clamp(min=1e-6).log())
        return super().rollout(batch, clock)


class FirstMode(Reward):
    """How surely a noisy state comes from the first mode, by the teacher's exact posterior at its time."""

    space = "latent"

    def __init__(self, backbone: GaussianBackbone) -> None:
        self.backbone = backbone

    def score(self, x: Tensor, prompts: Prompts, t: Tensor) -> Tensor:
        alpha, sigma = (c.view(-1, 1) for c in self.backbone.process.alpha_sigma(t, torch.float64))
        joint, _ = self.backbone.roles[TEACHER].log_joint(x.double().flatten(1), alpha, sigma)
        return joint.log_softmax(1)[:, 0].float()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_reward(
        KnownReward("first_mode", "latent", "ours", "here", "", ""), lambda _, backbone: FirstMode(backbone)
    )
    yield
    del KNOWN_REWARDS["first_mode"], REWARDS["first_mode"]


@torch.no_grad()
def masses(method: Dmd2) -> Tensor:
    """The share of each mode in the student's samples of 1,000 fixed noises, float64 (3,)."""
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(1000, *SHAPE, generator=generator) for _ in range(2)]
    cond = Cond({"components": torch.ones(1000, 3, dtype=torch.bool)})
    x0 = method.sample(STUDENT, noises, cond, cond, Sampler("lcm", 2))
    return torch.bincount((x0.double().flatten(1) @ MODES.T).argmax(1), minlength=3) / 1000


def trained(folder: Path, process: Process, *overrides: str) -> Tensor:
    """The masses after 80 turns of the student, of either kind."""
    options = [
        "method.num_steps=2", "method.gan=off", "method.guidance=1", "method.weight_decay=0", "train.batch_size=32",
        "method.student_lr=0.2", "method.fake_score_lr=0", "method.adam_betas=[0.5,0.9]", "method.ttur=1",
        "train.max_grad_norm=100", "train.budget.amount=80", "train.lr_decay=0.5", "method.rl.beta=20",
        "method.rl.clamp=0", f"execution.runs_dir={folder}", "execution.log_every_images=100000",
        "execution.checkpoint_every_images=1000000", *overrides,
    ]  # fmt: skip
    config = compose("dmd2/tiny", options)
    config.backbone.weights_hash, config.data.data_hash = "oracle", "oracle"
    mixture = GaussianMixture(MODES, 0.2 * torch.eye(2).double().expand(3, 2, 2))
    backbone: Backbone = Sender(mixture, process, "x0", SHAPE)
    method = Tracked(config.method, backbone, seed=0)
    latents, cond = np.zeros((32, *SHAPE), np.float32), {"components": np.ones((1, 3), bool)}
    cache = LatentCache(latents, np.zeros(32, np.int64), [""], cond, [""] * 32, "oracle")
    run = Run.create(config)
    Trainer(config, method, LatentData(cache, 0), run, build_clock(config), run.begin_attempt()).train()
    return masses(method)


@pytest.mark.parametrize("process", PROCESSES)
def test_distillation_keeps_the_other_modes_that_rl_alone_gives_up(tmp_path: Path, process: str) -> None:
    rl = ["method.rl.reward=first_mode", "method.rl.ratio=1", "method.rl.weight=0.01"]
    both = trained(tmp_path / "both", PROCESSES[process], *rl)
    alone = trained(tmp_path / "alone", PROCESSES[process], *rl, "method.rl.distil=false")
    third = 1 / 3  # the teacher's masses, which the student starts with
    assert third + 0.01 < both[0] < third * 1.2, "RL raises the mode that the reward likes"
    assert (both[1:] - third).abs().max() < 0.1 * third, "and the others keep their mass"
    assert alone[1:].max() < 0.2 * third, "alone it leaves them next to none"
