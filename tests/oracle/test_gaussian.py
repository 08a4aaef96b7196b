"""The oracle: densities, scores, guidance, end points and distances against independent derivations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from core.backbones.base import TEACHER, Cond
from core.backbones.gaussian import (
    GaussianBackbone,
    GaussianMixture,
    frechet_distance,
    kl_divergence,
    ode_transport,
)
from core.config import UserError
from core.diffusion.process import KINDS, FlowProcess, Process, VPProcess
from core.diffusion.solvers import SOLVERS, Denoise, solve
from core.diffusion.unipc import unipc
from core.metrics.fid import frechet_from_moments
from tests import worlds

SHAPE, DIM = (3, 2, 2), 12
VP = VPProcess.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
FLOW = FlowProcess()
PROCESSES = pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])


def mixture(num_components: int) -> GaussianMixture:
    """Full, well-conditioned covariances, float64."""
    random = np.random.default_rng(num_components)
    factors = 0.06 * random.standard_normal((num_components, DIM, DIM)) + 0.6 * np.eye(DIM)
    weights = torch.from_numpy(random.uniform(0.5, 1.5, num_components))
    means = torch.from_numpy(0.5 * random.standard_normal((num_components, DIM)))
    return GaussianMixture(means, torch.from_numpy(factors), weights).requires_grad_(False)


def noise(batch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((batch, DIM)))


def level(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = process.alpha_sigma(t, torch.float64)
    return alpha.view(-1, 1), sigma.view(-1, 1)


@PROCESSES
def test_density_score_and_denoiser(process: Process) -> None:
    target, x, t = mixture(3), noise(4).requires_grad_(), torch.tensor([30, 250, 749, 999])
    alpha, sigma = level(process, t)
    log_prob = target.log_prob(x, alpha, sigma)
    for i in range(4):  # the noised mixture, written down with torch's own distributions
        covariances = alpha[i] ** 2 * target.covariances() + sigma[i] ** 2 * torch.eye(DIM)
        components = MultivariateNormal(alpha[i] * target.means, covariances)
        theirs = MixtureSameFamily(Categorical(logits=target.log_weights), components).log_prob(x[i])
        torch.testing.assert_close(log_prob[i], theirs)
    (score,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(target.score(x, alpha, sigma), score)
    # Tweedie: E[x0 | x_t] = (x_t + sigma^2 score)/alpha
    torch.testing.assert_close(target.denoise(x, alpha, sigma), (x + sigma**2 * score) / alpha)


@PROCESSES
@pytest.mark.parametrize(("prediction", "as_"), list(itertools.product(KINDS, KINDS)))
def test_contract_returns_the_exact_value_of_every_kind(process: Process, prediction: str, as_: str) -> None:
    """Also at the ends, t = 0 and 999, where converting in float32 costs at most 1e-7/sigma."""
    target, x = mixture(2), noise(3)
    t = torch.tensor([0, 500, 999]) if process is VP else torch.tensor([10.0, 500.0, 990.0])
    alpha, sigma = level(process, t)
    x0, score = target.denoise(x, alpha, sigma), target.score(x, alpha, sigma)
    eps = -sigma * score
    exact = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[as_]
    backbone = GaussianBackbone(target.float(), process, prediction, SHAPE)
    got = backbone.predict(TEACHER, x.view(-1, *SHAPE).float(), t, backbone.encode_text([""]).expand(3), as_)
    torch.testing.assert_close(got.flatten(1).double(), exact, rtol=1e-4, atol=1e-4)
    assert backbone.evaluations == {TEACHER: 3}


def test_sigma_zero_is_the_identity() -> None:
    backbone = GaussianBackbone(mixture(2), FLOW, "flow", SHAPE)
    x = noise(1).view(-1, *SHAPE).double()
    got = backbone.predict(TEACHER, x, torch.zeros(1), backbone.encode_text([""]))
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


@PROCESSES
def test_guidance_is_the_score_of_the_sharpened_posterior(process: Process) -> None:
    """s_w = grad [w log p(x|c) + (1-w) log p(x)], one w per sample, as one batch of 2B."""
    target, t, w = mixture(3), torch.tensor([249, 499, 749]), torch.tensor([0.0, 1.0, 7.5])
    x = noise(3).float().double().requires_grad_()
    alpha, sigma = level(process, t)
    chosen = torch.tensor([[False, True, False], [True, False, True], [False, False, True]])
    log_cond, log_null = (target.log_prob(x, alpha, sigma, mask) for mask in (chosen, None))
    (score,) = torch.autograd.grad((w * log_cond + (1 - w) * log_null).sum(), x)
    exact = (x + sigma**2 * score) / alpha
    backbone = GaussianBackbone(target.float(), process, "v", SHAPE)
    cond, null = backbone.encode_text(["1", "0 2", "2"]), backbone.encode_text([""])
    assert torch.equal(cond.tensors["components"], chosen)
    latents = x.detach().float().view(-1, *SHAPE)
    got = backbone.guided(TEACHER, latents, t, cond, null, w).flatten(1).double()
    error = (got - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 1e-4
    assert backbone.evaluations == {TEACHER: 6}


def oracle_denoise(target: GaussianMixture, process: Process) -> Denoise:
    def run(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return target.denoise(x.flatten(1), *level(process, t)).view_as(x)

    return run


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)).max().item()


def endpoint_error(process: Process, grid: np.ndarray, solver: str, start: Tensor | None = None) -> float:
    """Relative error against the closed form: the ODE down to the grid's last time, then E[x0 | x_t].

    The last step, to sigma = 0, is one prediction of x0 in every solver; where the last sigma is small it
    hardly differs from the ODE's own end.
    """
    target, x = mixture(1), noise(4)
    start = torch.zeros(4, dtype=torch.long) if start is None else start
    got, count = solve(oracle_denoise(target, process), x.view(-1, *SHAPE), start, grid, process, solver)
    assert count == (len(grid) - start).sum()
    times = torch.from_numpy(grid)
    last = level(process, times[-1:])
    moved = ode_transport(x, target.means[0], target.covariances()[0], level(process, times[start]), last)
    return relative_error(got, target.denoise(moved, *(c.expand(4, 1) for c in last)))


# SD's schedule in continuous time, on a table fine enough to take any step in log-SNR
FINE_TIME = (np.arange(100_000) + 1) / 100_000
FINE_ROOT = 0.00085**0.5 + FINE_TIME * (0.012**0.5 - 0.00085**0.5)
FINE_VP = VPProcess(np.exp(-1000 * np.cumsum(FINE_ROOT**2) / 100_000))


def fine_grid(num_steps: int) -> np.ndarray:
    """Times from full noise to sigma = 0.03, uniform in log-SNR."""
    alpha, sigma = (c.flatten().numpy() for c in FINE_VP.alpha_sigma(torch.arange(100_000), torch.float64))
    log_snr = np.log(alpha / sigma)
    wanted = np.linspace(log_snr[-1], -np.log(0.03), num_steps)
    return len(log_snr) - 1 - np.searchsorted(log_snr[::-1], wanted - 1e-12)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("family", ["vp", "flow"])
def test_solvers_converge_to_the_closed_form_at_their_order(family: str, solver: str, order: int) -> None:
    """A flow's even times do not shrink the log-SNR steps at its ends: order 2 up to a logarithm."""
    process, grid = (FINE_VP, fine_grid) if family == "vp" else (FLOW, FLOW.timesteps)
    coarse, fine = (endpoint_error(process, grid(num_steps), solver) for num_steps in (100, 200))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_ode_end_points_agree_with_the_closed_form() -> None:
    """To 1e-4, at full noise and from starts inside the grid."""
    start = torch.tensor([0, 100, 200, 300])
    assert endpoint_error(FINE_VP, fine_grid(400), "dpmpp_2m", start) < 1e-4
    assert endpoint_error(FLOW, FLOW.timesteps(600), "dpmpp_2m", start) < 1e-4
    # a flow's last sigma is small enough to reach the data
    target, x = mixture(1), noise(4)
    begin, data = (torch.zeros(1, 1), torch.ones(1, 1)), (torch.ones(1, 1), torch.zeros(1, 1))
    got, _ = solve(oracle_denoise(target, FLOW), x.view(-1, *SHAPE), 0 * start, FLOW.timesteps(600), FLOW, "dpmpp_2m")
    assert relative_error(got, ode_transport(x, target.means[0], target.covariances()[0], begin, data)) < 1e-4


def test_unipc_is_as_near_to_the_closed_form_as_our_second_order_solver() -> None:
    """On Stable Diffusion's own times, whose last step dominates what is left of the error at any order."""
    process = VPProcess.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    target, x = mixture(1), noise(4)
    denoise = oracle_denoise(target, process)
    begin, data = level(process, torch.tensor([999])), (torch.ones(1, 1), torch.zeros(1, 1))
    exact = ode_transport(x, target.means[0], target.covariances()[0], begin, data)
    calls = []

    def single(latents: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        assert rows.tolist() == [0, 1, 2, 3] and t.shape == (4,)
        calls.append(int(t[0]))
        return denoise(latents.double(), t, rows).float()

    start, latents = torch.zeros(4, dtype=torch.long), x.view(-1, *SHAPE)
    for num_steps in (10, 40):
        grid = process.timesteps(num_steps)
        ours = {name: relative_error(solve(denoise, latents, start, grid, process, name)[0], exact) for name in SOLVERS}
        calls.clear()
        theirs = relative_error(unipc(single, latents, num_steps, process).double(), exact)
        assert calls == grid.tolist()
        assert theirs == pytest.approx(ours["dpmpp_2m"], rel=0.05) and theirs < 0.75 * ours["ddim"]


def test_mixture_end_points_agree_with_a_runge_kutta_reference() -> None:
    """dx/dt = E[eps - x0 | x_t] of a mixture whose modes pull apart, integrated by SciPy to 1e-8."""
    target, x = mixture(3), noise(3)

    def velocity(t: float, flat: np.ndarray) -> np.ndarray:
        now, alpha = torch.from_numpy(flat).view(3, DIM), torch.full((3, 1), 1 - t, dtype=torch.float64)
        eps_minus_x0 = -t * target.score(now, alpha, 1 - alpha) - target.denoise(now, alpha, 1 - alpha)
        return eps_minus_x0.flatten().numpy()

    reference = solve_ivp(velocity, (1, 0), x.flatten().numpy(), rtol=1e-8, atol=1e-9).y[:, -1]
    start = torch.zeros(3, dtype=torch.long)
    got, _ = solve(oracle_denoise(target, FLOW), x.view(-1, *SHAPE), start, FLOW.timesteps(500), FLOW, "dpmpp_2m")
    error = np.linalg.norm(got.flatten().numpy() - reference) / np.linalg.norm(reference)
    assert error < 1e-4


def test_frechet_distance_three_ways() -> None:
    first, second = mixture(1), mixture(2)
    moments = [(m.means[0], m.factors[0], m.covariances()[0]) for m in (first, second)]
    (mean_1, factor_1, cov_1), (mean_2, factor_2, cov_2) = moments
    exact = frechet_distance(mean_1, factor_1, mean_2, factor_2).item()
    measured = frechet_from_moments(mean_1.numpy(), cov_1.numpy(), mean_2.numpy(), cov_2.numpy())
    assert measured == pytest.approx(exact, rel=1e-4)
    # commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2
    axes = [torch.diag(torch.linspace(low, high, DIM).double()) for low, high in ((0.5, 2.0), (1.5, 1.0))]
    by_hand = (mean_1 - mean_2).square().sum() + (axes[0] - axes[1]).square().sum()
    torch.testing.assert_close(frechet_distance(mean_1, axes[0], mean_2, axes[1]), by_hand)


def test_kl_divergence_matches_torch() -> None:
    first, second = mixture(1), mixture(2)
    p, q = (MultivariateNormal(m.means[0], m.covariances()[0]) for m in (first, second))
    ours = kl_divergence(first.means[0], first.covariances()[0], second.means[0], second.covariances()[0])
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(p, q))


def test_roles_are_copies_with_their_own_parameters() -> None:
    backbone = GaussianBackbone(mixture(2), VP, "eps", SHAPE)
    backbone.add_role("student", trainable=True)
    backbone.add_role("fake_score", like="student", trainable=False)
    student, teacher = backbone.role_parameters("student"), backbone.role_parameters(TEACHER)
    assert all(p.requires_grad for p in student.values())
    assert not any(p.requires_grad for p in teacher.values())
    with torch.no_grad():
        student["means"].add_(1)
    assert not torch.equal(student["means"], teacher["means"])
    worlds.copy_role(backbone, "student", "fake_score")
    assert torch.equal(backbone.role_parameters("fake_score")["means"], student["means"])


def test_images_and_prompts() -> None:
    backbone = GaussianBackbone(mixture(2), VP, "eps", SHAPE)
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 2, 3), dtype=np.uint8)
    np.testing.assert_array_equal(backbone.decode(backbone.encode(images)), images)
    cond = backbone.encode_text(["", "1"])
    assert isinstance(cond, Cond) and cond.tensors["components"].tolist() == [[True, True], [False, True]]
    with pytest.raises(UserError, match=r"'7' is not a component of the mixture: 0..1"):
        backbone.encode_text(["7"])
