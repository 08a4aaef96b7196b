"""Solvers against diffusers' schedulers on the same network, and the accounting of the active set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from torch import Tensor

from core.diffusion.process import FlowProcess, Process, VPProcess
from core.diffusion.solvers import Denoise, boundary_scalings, ddim_step, few_step_sample, solve
from core.diffusion.timesteps import trailing_timesteps

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = VPProcess.from_config(SD)


def eps_network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth non-linear stand-in for a network that predicts eps."""
    return torch.tanh(0.7 * x + x.mean((1, 2, 3), keepdim=True)) + 0.1 * torch.sin(t.view(-1, 1, 1, 1) / 100)


def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    return VP.convert(eps_network(x, t.double()), x, t, "eps", "x0")


def noise(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diffusers_loop(scheduler, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(eps_network(x, t.view(1).double()), t, x).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 4, 20, 50])
def test_ddim_matches_diffusers(num_steps: int) -> None:
    """Only where K divides T: elsewhere diffusers steps by T // K, off its own grid."""
    scheduler = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    grid = trailing_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == grid.tolist()
    x = noise(2)
    got, _ = solve(denoise, x, torch.zeros(2, dtype=torch.long), grid, VP, "ddim")
    torch.testing.assert_close(got, diffusers_loop(scheduler, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 15, 32])
def test_dpmpp_2m_matches_diffusers(num_steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **SD, timestep_spacing="trailing", final_sigmas_type="zero", solver_order=2, solver_type="midpoint"
    )
    scheduler.set_timesteps(num_steps)
    grid = trailing_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == grid.tolist()
    x = noise(2)
    got, _ = solve(denoise, x, torch.zeros(2, dtype=torch.long), grid, VP, "dpmpp_2m")
    torch.testing.assert_close(got, diffusers_loop(scheduler, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_few_step_sampling_matches_lcm(num_steps: int) -> None:
    """LCM takes these timesteps only with as many original steps; its default grid is 999, 759, 499, 259."""
    scheduler = LCMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(num_steps, original_inference_steps=num_steps)
    assert scheduler.timesteps.tolist() == trailing_timesteps(num_steps).tolist()
    noises = [noise(2, seed) for seed in range(num_steps)]
    x = noises[0]
    for step, t in enumerate(scheduler.timesteps):
        generator = torch.Generator().manual_seed(step + 1)  # draws what noises[step + 1] drew
        x = scheduler.step(eps_network(x, t.view(1).double()), t, x, generator=generator).prev_sample
    got = few_step_sample(denoise, noises, trailing_timesteps(num_steps), VP)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_few_step_sampling_matches_ddim(eta: float) -> None:
    scheduler = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == trailing_timesteps(4).tolist()
    noises = [noise(2, seed) for seed in range(4)]
    x = noises[0]
    for step, t in enumerate(scheduler.timesteps):
        fresh = noises[step + 1] if step < 3 else torch.zeros_like(x)
        network = eps_network(x, t.view(1).double())
        x = scheduler.step(network, t, x, eta=eta, variance_noise=fresh if eta else None).prev_sample
    got = few_step_sample(denoise, noises, trailing_timesteps(4), VP, "ddim", eta)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def test_ddim_without_new_noise_is_the_ode_solver_s() -> None:
    for process in (VP, FlowProcess(shift=3.0)):
        grid = process.timesteps(4)
        network = lambda x, t, rows: torch.tanh(x)  # noqa: E731
        noises = [noise(2, seed) for seed in range(4)]
        expected, _ = solve(network, noises[0], torch.zeros(2, dtype=torch.long), grid, process, "ddim")
        got = few_step_sample(network, noises, grid, process, "ddim")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_boundary_scalings_are_the_identity_at_zero_and_the_network_elsewhere() -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1, 249, 999]))
    np.testing.assert_allclose(c_skip.flatten(), [1, 0.25 / 100.25, 4.0321e-8, 2.505e-9], rtol=1e-3)
    np.testing.assert_allclose(c_out.flatten(), [0, 10 / 100.25**0.5, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("process", [VP, FlowProcess(shift=3.0)], ids=["vp", "flow"])
def test_active_set_equals_solving_each_sample_alone(solver: str, process: Process) -> None:
    """Per-sample parameters also show that ``rows`` are positions in the caller's batch."""
    slope = torch.linspace(0.2, 0.9, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    seen: list[int] = []

    def network(base: int) -> Denoise:
        def run(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            assert len(x) == len(t) == len(rows)
            seen.extend((rows + base).tolist())
            return torch.tanh(slope[rows + base] * x) + 0.1 * torch.cos(t.view(-1, 1, 1, 1) / 300)

        return run

    grid, start, x = process.timesteps(8), torch.tensor([5, 0, 7, 0, 3, 7]), noise(6)
    before = x.clone()
    together, count = solve(network(0), x, start, grid, process, solver)
    assert count == len(seen) == (8 - start).sum().item() == 26
    assert [seen.count(i) for i in range(6)] == (8 - start).tolist()
    assert torch.equal(x, before)
    for i in range(6):
        alone, count = solve(network(i), x[i : i + 1], start[i : i + 1], grid, process, solver)
        assert count == 8 - start[i]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("process", "dtype"), [(VP, torch.int64), (FlowProcess(), torch.float32)], ids=["vp", "flow"])
def test_networks_get_times_in_their_own_units_and_no_graph(process: Process, dtype: torch.dtype) -> None:
    weight = torch.ones((), requires_grad=True)
    times: list[Tensor] = []

    def network(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        times.append(t)
        return weight * x

    x0, _ = solve(network, noise(1).bfloat16(), torch.tensor([0]), process.timesteps(4), process)
    assert {t.dtype for t in times} == {dtype}
    np.testing.assert_allclose([t.item() for t in times], process.timesteps(4))
    assert x0.dtype == torch.float32 and not x0.requires_grad


def test_one_ddim_step_is_diffusers() -> None:
    """Each sample between times of its own; a flow's step is Euler's."""
    scheduler = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x, times = noise(2), [999, 599]
    t, following = torch.tensor(times), torch.tensor([899, 499])
    stepped = ddim_step(x, denoise(x, t, t), t, following, VP)
    for row, time in enumerate(times):
        only = x[row : row + 1]
        expected = scheduler.step(eps_network(only, torch.tensor([float(time)]).double()), time, only).prev_sample
        torch.testing.assert_close(stepped[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    flow, velocity = FlowProcess(), noise(2, seed=1)
    t, following = torch.tensor([1000.0, 500.0]).double(), torch.tensor([750.0, 0.0]).double()
    x0 = x - (t / 1000).view(-1, 1, 1, 1) * velocity
    euler = x + ((following - t) / 1000).view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(ddim_step(x, x0, t, following, flow), euler)
