"""The DMD gradient against autograd of the closed-form KL divergence, value and sign.

Student and teacher are Gaussians, so at a noised sample both scores are linear in (z, eps), the gradient of
the KL w.r.t. the student's mean is a first moment and w.r.t. its factor a second moment. A symmetric set of
points with zero mean and unit covariance computes both exactly: no Monte Carlo error hides a wrong constant.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from core.backbones.base import TEACHER
from core.backbones.gaussian import GaussianBackbone, GaussianMixture, kl_divergence
from core.diffusion.process import FlowProcess, Process, VPProcess
from core.losses.matching import dmd_gradient, dmd_loss
from tests import worlds

SHAPE, DIM = (3, 1, 2), 6
VP = VPProcess.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
PROCESSES = pytest.mark.parametrize("process", [VP, FlowProcess()], ids=["vp", "flow"])


def gaussian(seed: int) -> GaussianMixture:
    random = np.random.default_rng(seed)
    factor = 0.2 * random.standard_normal((1, DIM, DIM)) + 0.6 * np.eye(DIM)
    return GaussianMixture(torch.from_numpy(random.standard_normal((1, DIM))), torch.from_numpy(factor))


def cubature_points() -> tuple[Tensor, Tensor]:
    """z and eps, each (4 DIM, DIM): +-sqrt(2 DIM) along each axis of the joint space."""
    identity = torch.eye(2 * DIM, dtype=torch.float64)
    joint = (2 * DIM) ** 0.5 * torch.cat([identity, -identity])
    return joint[:, :DIM], joint[:, DIM:]


class Game:
    """A Gaussian student against a Gaussian teacher; the fake score is the student's exact denoiser."""

    def __init__(self, process: Process, time: int) -> None:
        self.process = process
        self.backbone = GaussianBackbone(gaussian(0), process, "v", SHAPE)
        self.backbone.add_role("student", trainable=True)
        self.backbone.add_role("fake_score", trainable=False)
        self.student = self.backbone.role_parameters("student")
        other = gaussian(1)
        with torch.no_grad():
            self.student["means"].copy_(other.means)
            self.student["factors"].copy_(other.factors)
        z, eps = cubature_points()
        self.z, self.eps = z, eps.view(-1, *SHAPE)
        self.t = torch.full((len(z),), time)
        self.cond = self.backbone.encode_text([""]).expand(len(z))

    def estimates(self) -> tuple[Tensor, Tensor, Tensor]:
        """The student's samples with graph, and the teacher's and the fake score's view of them, noised."""
        worlds.copy_role(self.backbone, "student", "fake_score")
        x0 = (self.student["means"] + self.z @ self.student["factors"][0].mT).view(-1, *SHAPE)
        x_t = self.process.add_noise(x0.detach(), self.eps, self.t)
        real = self.backbone.predict(TEACHER, x_t, self.t, self.cond)
        return x0, real, self.backbone.predict("fake_score", x_t, self.t, self.cond)

    def noised_kl(self) -> Tensor:
        """KL of the noised student from the noised teacher, float64, differentiable."""
        alpha, sigma = (c.flatten() for c in self.process.alpha_sigma(self.t[:1], torch.float64))
        moments = []
        for role in ("student", TEACHER):
            parameters = self.backbone.role_parameters(role)
            factor = parameters["factors"][0].double()
            moments.append(alpha * parameters["means"][0].double())
            moments.append(alpha**2 * factor @ factor.mT + sigma**2 * torch.eye(DIM))
        return kl_divergence(*moments)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@PROCESSES
@pytest.mark.parametrize("time", [100, 499, 900])
def test_dmd_gradient_is_the_gradient_of_the_kl(process: Process, time: int) -> None:
    """With its normaliser replaced by the true factor alpha^2/sigma^2, through ``dmd_loss`` and autograd."""
    game = Game(process, time)
    x0, real, fake = game.estimates()
    alpha, sigma = process.alpha_sigma(game.t)
    normaliser = (x0 - real).abs().mean((1, 2, 3), keepdim=True) + 1e-5
    gradient = dmd_gradient(x0.detach(), real, fake) * normaliser.detach() * alpha**2 / sigma**2
    # dmd_loss averages over C, H, W and carries a 2
    loss = dmd_loss(x0, gradient) * DIM / 2
    parameters = [game.student["means"], game.student["factors"]]
    ours = torch.autograd.grad(loss, parameters)
    exact = torch.autograd.grad(game.noised_kl(), parameters)
    assert relative_error(ours[0], exact[0]) < 1e-4
    assert relative_error(ours[1], exact[1]) < 1e-4


@PROCESSES
def test_dmd_gradient_has_its_closed_form_value(process: Process) -> None:
    """(x0_fake - x0_real)/(mean |x0 - x0_real| + 1e-5), posterior means by the Gaussian formula."""
    game = Game(process, 600)
    x0, real, fake = game.estimates()
    got = dmd_gradient(x0.detach(), real, fake).flatten(1)
    alpha, sigma = (c.view(-1, 1) for c in process.alpha_sigma(game.t, torch.float64))
    flat = x0.detach().double().flatten(1)
    x_t = alpha * flat + sigma * game.eps.double().flatten(1)
    posterior = {}
    for role in ("student", TEACHER):
        parameters = game.backbone.role_parameters(role)
        mean, factor = parameters["means"][0].detach().double(), parameters["factors"][0].detach().double()
        cov = factor @ factor.mT
        gain = alpha[0] * cov @ torch.linalg.inv(alpha[0] ** 2 * cov + sigma[0] ** 2 * torch.eye(DIM))
        posterior[role] = mean + (x_t - alpha * mean) @ gain.mT
    difference = posterior["student"] - posterior[TEACHER]
    exact = difference / ((flat - posterior[TEACHER]).abs().mean(1, keepdim=True) + 1e-5)
    assert relative_error(got, exact) < 1e-4


def test_descending_the_dmd_loss_lowers_the_kl() -> None:
    game = Game(VP, 499)
    optimizer = torch.optim.Adam([game.student["means"], game.student["factors"]], lr=0.02)
    before = game.noised_kl().item()
    for _ in range(150):
        x0, real, fake = game.estimates()
        optimizer.zero_grad()
        dmd_loss(x0, dmd_gradient(x0.detach(), real, fake)).backward()
        optimizer.step()
    assert game.noised_kl().item() < 0.02 * before
    assert relative_error(game.student["means"].detach(), game.backbone.role_parameters(TEACHER)["means"]) < 0.1
