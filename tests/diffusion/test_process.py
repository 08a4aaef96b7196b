"""Processes and conversions.

The conversions, on paper. With x_t = a x0 + s eps:
  eps  -> x0 = (x_t - s eps)/a            x0  -> eps = (x_t - a x0)/s
  v = a eps - s x0, so with a^2 + s^2 = 1: x0 = a x_t - s v, eps = s x_t + a v
  u = eps - x0: x_t = a x0 + s (u + x0), so x0 = (x_t - s u)/(a + s) and eps = (x_t + a u)/(a + s)
At the ends (SD's schedule): a_0 = .99958, s_0 = .02915; a_999 = .06826, s_999 = .99767. Only
eps -> x0 divides by a and only x0 -> eps divides by s. The worst out of v and u is
v -> u = (a + s)/(a^2 + s^2), which is 2 half-way through a flow.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from core.config import UserError
from core.diffusion.process import KINDS, FlowProcess, Process, VPProcess

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ENDS = [
    (VPProcess.from_config(SD), torch.tensor([0, 1, 500, 998, 999])),
    (FlowProcess(), torch.tensor([1.0, 250.0, 500.0, 750.0, 999.0])),
]


def predictions(process: Process, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """x_t and the four predictions that describe it, by their definitions."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(len(t), 3, 2, 2, generator=generator, dtype=torch.float64)
    eps = torch.randn(len(t), 3, 2, 2, generator=generator, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t, torch.float64)
    return alpha * x0 + sigma * eps, {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}


@pytest.mark.parametrize(("process", "t"), ENDS, ids=["vp", "flow"])
@pytest.mark.parametrize(("from_", "to"), list(itertools.product(KINDS, KINDS)))
def test_every_conversion_is_exact_from_end_to_end(process: Process, t: Tensor, from_: str, to: str) -> None:
    x_t, kinds = predictions(process, t)
    got = process.convert(kinds[from_], x_t, t, from_, to)
    torch.testing.assert_close(got, kinds[to], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("process", "t"), ENDS, ids=["vp", "flow"])
@pytest.mark.parametrize("from_", ["v", "flow"])
@pytest.mark.parametrize("to", KINDS)
def test_errors_of_v_and_flow_predictions_are_not_amplified(process: Process, t: Tensor, from_: str, to: str) -> None:
    """Through eps, an error of v at t = 999 would reach x0 15 times larger."""
    x_t, kinds = predictions(process, t)
    error = process.convert(kinds[from_] + 0.01, x_t, t, from_, to) - kinds[to]
    assert error.abs().max() <= 0.02 + 1e-9


def test_conversions_are_computed_in_float32_from_bfloat16_predictions() -> None:
    process, t = VPProcess.from_config(SD), torch.tensor([0, 999])
    x_t, kinds = predictions(process, t)
    v = kinds["v"].bfloat16()
    got = process.convert(v, x_t.float(), t, "v", "x0")
    alpha, sigma = process.alpha_sigma(t, torch.float64)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), alpha * x_t - sigma * v.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("to", KINDS)
def test_vanishing_coefficients_stay_finite(to: str) -> None:
    """At sigma = 0 x0 says nothing about eps: E[eps] = 0, so v = 0 (alpha = 1) and flow = -x0."""
    x_t = torch.full((1, 1, 1, 1), 0.5)
    got = FlowProcess().convert(x_t, x_t, torch.zeros(1), "x0", to)
    assert got.item() == {"x0": 0.5, "eps": 0.0, "v": 0.0, "flow": -0.5}[to]
    full_noise = FlowProcess().convert(x_t, x_t, torch.full((1,), 1000.0), "eps", to)
    assert full_noise.item() == {"x0": 0.0, "eps": 0.5, "v": 0.0, "flow": 0.5}[to]


@pytest.mark.parametrize(
    "config",
    [
        SD,
        SD | {"rescale_betas_zero_snr": True},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.001, 0.2, 10).tolist(), "num_train_timesteps": 10},
    ],
    ids=["sd", "zero_snr", "linear", "cosine", "trained"],
)
def test_vp_tables_match_diffusers(config: dict) -> None:
    scheduler = DDPMScheduler(**config)
    process = VPProcess.from_config(scheduler.config)
    alpha, sigma = process.alpha_sigma(torch.arange(process.num_train_timesteps))
    # diffusers multiplies a thousand factors in float32
    theirs = scheduler.alphas_cumprod.double()
    np.testing.assert_allclose(alpha.flatten(), theirs.sqrt(), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(sigma.flatten(), (1 - theirs).sqrt(), rtol=2e-4, atol=1e-6)


def test_known_values_of_stable_diffusion() -> None:
    alpha, sigma = VPProcess.from_config(SD).alpha_sigma(torch.tensor([0, 999]))
    np.testing.assert_allclose(alpha.flatten(), [0.99957, 0.06826], atol=1e-5)
    np.testing.assert_allclose(sigma.flatten(), [0.02915, 0.99767], atol=1e-5)


def test_add_noise_is_the_definition() -> None:
    x0, eps = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    assert FlowProcess().add_noise(x0, eps, torch.tensor([250.0])).item() == 0.75 * 2 - 0.25
    noised = VPProcess.from_config(SD).add_noise(x0, eps, torch.tensor([999]))
    np.testing.assert_allclose(noised.item(), 2 * 0.068265 - 0.997667, atol=1e-5)


def test_fractions_cover_the_times_evenly() -> None:
    fractions = (torch.arange(4000) + 0.5) / 4000
    counts = torch.bincount(VPProcess.from_config(SD).timestep(fractions), minlength=1000)
    assert counts.unique().tolist() == [4]


def test_flow_grids() -> None:
    np.testing.assert_allclose(FlowProcess().timesteps(4), [1000, 750, 500, 250])
    # sigma' = 3 sigma/(1 + 2 sigma)
    np.testing.assert_allclose(FlowProcess(shift=3.0).timesteps(4), [1000, 900, 750, 500])


def test_an_unknown_schedule_is_one_line_that_lists_what_is_allowed() -> None:
    with pytest.raises(UserError, match="beta_schedule='sigmoid' is not one of linear, scaled_linear"):
        VPProcess.from_config({"beta_schedule": "sigmoid"})
