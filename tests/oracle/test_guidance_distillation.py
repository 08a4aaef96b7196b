"""A guidance student on the exact denoiser: it learns to be the guided teacher at every w of its range, in one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.backbones.base import STUDENT, TEACHER, Cond
from core.backbones.gaussian import GaussianBackbone
from core.data.batches import Batch
from core.diffusion.guidance import fourier_features
from core.diffusion.process import FlowProcess, Process
from core.methods.clock import Clock
from core.methods.guidance import Guidance
from core.methods.guidance_config import GuidanceConfig
from tests.oracle.test_gaussian import SHAPE, VP, mixture

WIDTH, LOW, HIGH = 64, 2.0, 9.0


class Embedding(GaussianBackbone):
    """The student is the conditional oracle, and as much of its direction away from the null one as a layer makes of w.

    The layer reads the features of w that networks read and starts at zero.
    """

    def __init__(self, process: Process) -> None:
        super().__init__(mixture(3), process, "x0", SHAPE)
        self.has_guidance_layer = True
        self.layer = nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x_cond = super().network(role, x_t, t, cond)
        w = cond.tensors.get("guidance")
        if w is None:
            assert role == TEACHER, "the student is always told its w, and the teacher never"
            return x_cond
        x_null = super().network(role, x_t, t, self.encode_text([""]).expand(len(x_t)))
        away = self.layer(fourier_features(w, WIDTH)).view(-1, 1, 1, 1)
        return x_cond + away * (x_cond - x_null)

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        return {"layer": self.layer.weight} if role == STUDENT else {}


def a_method(process: Process, **settings: object) -> Guidance:
    config = GuidanceConfig(guidance_min=LOW, guidance_max=HIGH, **settings)
    config.validate()
    return Guidance(config, Embedding(process), seed=0)


def a_batch(backbone: GaussianBackbone, first: int, size: int = 16) -> Batch:
    positions = np.arange(first, first + size)
    x0 = torch.from_numpy(np.random.default_rng(first).standard_normal((size, *SHAPE))).float()
    return Batch(positions, x0, backbone.encode_text(["0", "1", "2", "0 1"] * (size // 4)), backbone.encode_text([""]))


@pytest.mark.parametrize("process", [VP, FlowProcess()], ids=["vp", "flow"])
def test_a_guidance_student_equals_the_guided_denoiser_at_every_w_of_its_range(process: Process) -> None:
    method = a_method(process)
    backbone, (player,) = method.backbone, method.players()
    rollout = method.rollout(a_batch(backbone, 0, 256), Clock(1, "images", 256))
    optimizer = torch.optim.LBFGS(player.parameters.values(), max_iter=30, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = method.losses(STUDENT, rollout, Clock(1, "images", 256))["distill"]
        found.backward()
        return found

    optimizer.step(loss)
    batch = a_batch(backbone, 10_000)
    t = process.timestep(torch.linspace(0.05, 0.95, 16))
    x_t = process.add_noise(batch.x0, torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0)), t)
    with torch.no_grad():
        for w in torch.linspace(LOW, HIGH, 8).tolist():
            backbone.evaluations.clear()
            student = backbone.guided(STUDENT, x_t, t, batch.cond, batch.null, w)
            teacher = backbone.guided(TEACHER, x_t, t, batch.cond, batch.null, w)
            assert dict(backbone.evaluations) == {STUDENT: 16, TEACHER: 32}, "one pass for two"
            assert (student - teacher).norm() < 1e-2 * teacher.norm(), w


@pytest.mark.parametrize("process", [VP, FlowProcess()], ids=["vp", "flow"])
def test_the_target_is_the_guided_teacher_and_the_student_begins_as_the_conditional_one(process: Process) -> None:
    method = a_method(process, num_timesteps=4, null_prob=0.25)
    backbone, batch = method.backbone, a_batch(method.backbone, 0, 64)
    rollout = method.rollout(batch, Clock(1, "images", 64))
    method.losses(STUDENT, rollout, Clock(1, "images", 64))
    w = torch.from_numpy(method.stream(STUDENT, "guidance").uniform(batch.positions, LOW, HIGH)).float()
    torch.testing.assert_close(rollout.cond.tensors["guidance"], w)
    shown = Cond({"components": rollout.cond.tensors["components"]})
    alike = (shown.tensors["components"] == batch.cond.tensors["components"]).all(1)
    assert shown.tensors["components"][~alike].all() and 0.1 < (~alike).float().mean() < 0.5, "a quarter is all of them"
    x_cond = backbone.predict(TEACHER, rollout.x_t, rollout.t, shown)
    x_null = backbone.predict(TEACHER, rollout.x_t, rollout.t, batch.null.expand(64))
    expected = w.view(-1, 1, 1, 1) * x_cond + (1 - w).view(-1, 1, 1, 1) * x_null
    torch.testing.assert_close(rollout.target, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.samples, x_cond)
    grid = process.timesteps(4)
    assert set(rollout.t.tolist()) == set(grid.tolist())
    noise = torch.from_numpy(method.stream(STUDENT, "noise").normal(batch.positions, SHAPE))
    first = rollout.t == grid[0]
    torch.testing.assert_close(rollout.x_t[first], noise[first].float())
