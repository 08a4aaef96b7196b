"""Latent consistency distillation on a real tiny network: its target, its last step, its cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import compose
from core.losses.distill import huber
from core.methods.lcm import TARGET
from core.training.loop import Trainer
from experiments.fake_training import build
from tests import worlds


def lcm(folder: Path, *overrides: str) -> Trainer:
    return worlds.trainer(folder, list(overrides), experiment="lcm/tiny")


def moved(trained: Trainer) -> Trainer:
    """The average is another network than the student and the teacher."""
    for number, parameter in enumerate(trained.method.backbone.role_parameters(TARGET).values()):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return trained


def test_the_target_is_the_averages_x0_after_one_guided_step_of_the_teacher(tmp_path: Path) -> None:
    """Recomputed from eps and the noise schedule for every sample; the last step ends at the teacher's x0."""
    trained = moved(lcm(tmp_path, "train.batch_size=16", "method.guidance_min=3", "method.guidance_max=9"))
    method, backbone = trained.method, trained.method.backbone
    batch = trained.data.batch(trained.clock.positions())
    rollout = method.rollout(batch, trained.clock)
    grid = method.timesteps.tolist()
    index = [grid.index(t) for t in rollout.t.tolist()]
    assert len(grid) - 1 in index and len(set(index)) > 4, "the last step is among them"
    w = method.stream("student", "guidance").uniform(batch.positions, 3, 9)
    alphas = np.sqrt(backbone.process.alphas_cumprod)

    def eps(role: str, row: int, x: Tensor, t: int, cond: object) -> Tensor:
        return backbone.network(role, x, torch.tensor([t]), cond)

    for row, step in enumerate(index):
        t, only = grid[step], slice(row, row + 1)
        x_t, alpha = rollout.x_t[only], alphas[t]
        sigma = np.sqrt(1 - alpha**2)
        noise = torch.from_numpy(method.stream("student", "noise").normal(batch.positions[only], (4, 8, 8)))
        torch.testing.assert_close(x_t, (alpha * batch.x0[only] + sigma * noise).float(), rtol=1e-4, atol=1e-5)
        conditional, empty = (eps("teacher", row, x_t, t, c) for c in (batch.cond[only], batch.null))
        guided = w[row] * conditional + (1 - w[row]) * empty
        x0 = (x_t - sigma * guided) / alpha
        expected = x0
        if step + 1 < len(grid):
            following = grid[step + 1]
            alpha_next = alphas[following]
            sigma_next = np.sqrt(1 - alpha_next**2)
            x_next = (alpha_next * x0 + sigma_next * guided).float()
            average = (x_next - sigma_next * eps(TARGET, row, x_next, following, batch.cond[only])) / alpha_next
            scaled = 10 * following
            c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
            expected = c_skip * x_next + c_out * average
        size = expected.abs().max().item()
        torch.testing.assert_close(rollout.target[only], expected.float(), rtol=1e-3, atol=1e-4 * size)


def test_the_loss_is_the_distance_of_the_students_x0_from_it(tmp_path: Path) -> None:
    trained = moved(lcm(tmp_path, "method.huber_c=0.01"))
    method, rollout = trained.method, trained.ahead.rollout(trained.data.batch(trained.clock.positions()))
    loss = method.losses("student", rollout, trained.clock)["consistency"]
    assert loss.item() == pytest.approx(huber(rollout.samples, rollout.target, 0.01).mean().item(), rel=1e-6)
    loss.backward()
    backbone = method.backbone
    assert any(p.grad is not None and p.grad.any() for p in backbone.role_parameters("student").values())
    assert all(p.grad is None for p in backbone.role_parameters(TARGET).values())


def test_evaluations_of_one_iteration_are_the_necessary_ones(tmp_path: Path) -> None:
    """One of the student, one of its average, two of the teacher (guidance), for each sample."""
    trained = lcm(tmp_path)
    trained._iteration()
    assert dict(trained.clock.evaluations) == {"teacher": 8, "target": 4, "student": 4}


def test_the_target_follows_the_student_at_its_own_rate(tmp_path: Path) -> None:
    trained = lcm(tmp_path, "method.target_decay=0.75", "train.ema_decay=0.5")
    name = next(n for n in trained.players["student"].parameters if "lora_B" in n)
    backbone = trained.method.backbone
    before = {role: backbone.role_parameters(role)[name].clone() for role in (TARGET, "student_ema")}
    trained._iteration()
    student = backbone.role_parameters("student")[name].detach()
    for role, decay in ((TARGET, 0.75), ("student_ema", 0.5)):
        expected = decay * before[role] + (1 - decay) * student
        torch.testing.assert_close(backbone.role_parameters(role)[name].detach(), expected.detach())


@pytest.mark.parametrize(("experiment", "parameters"), [("lcm/sd15", 67_252_224), ("lcm/sdxl", 196_751_360)])
def test_the_adapters_of_paper_scale_have_the_published_sizes(experiment: str, parameters: int) -> None:
    """LCM-LoRA: 67.5M in Flash Diffusion's Table 2 (0.4% more), 197M of the same 14 kinds of module on SDXL."""
    (student,) = build(compose(experiment, ["data.path=pictures"])).players()
    assert sum(parameter.numel() for parameter in student.parameters.values()) == parameters
