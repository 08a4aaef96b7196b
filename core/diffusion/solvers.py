"""Solvers of the teacher's ODE with one start per sample, and the few-step sampler of the student.

One contract of the network everywhere: ``denoise(x_t (A, C, H, W), t (A,), rows (A,)) -> x0 (A, C, H, W)``,
where ``rows`` are the positions of the A samples in the batch, by which the caller picks their conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from core.diffusion.process import Process
from core.sampler import FEW_STEP_SOLVERS

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
SOLVERS = ("ddim", "dpmpp_2m")


@torch.no_grad()
def solve(
    denoise: Denoise,
    x: Tensor,
    start: np.ndarray | Tensor,
    timesteps: np.ndarray,
    process: Process,
    solver: str = "ddim",
    first_call: int | None = None,
) -> tuple[Tensor, int]:
    """Solve the ODE from ``timesteps[start]`` to x0; returns (x0, number of network samples evaluated).

    ``x`` (B, C, H, W) is each sample at its own start, ``start`` (B,) its index on the grid ``timesteps``
    (K,). A sample enters when the grid reaches its start, so the cost is the sum of K - start, not B times
    the longest. A start that is no tensor of a device costs no synchronisation. Computed in at least float32; no
    graph is built. ``first_call``: a step from which on ``denoise`` is called at each, for processes that must call a
    sharded network equally often; a call that nobody needs takes one sample.

    ``ddim``: Song et al. (2021), Eq. 12, eta = 0; for a flow it is Euler's method. ``dpmpp_2m``: Lu et al.
    (2022), Alg. 2, in its midpoint form; a sample's first step and the last one, to sigma = 0, are of first
    order.
    """
    assert solver in SOLVERS, solver
    first = start.tolist()
    assert len(first) == len(x) and all(0 <= index < len(timesteps) for index in first), first
    order = _at(sorted(range(len(x)), key=first.__getitem__), x.device)
    first.sort()  # the active samples are now always the leading ones
    x = x.to(torch.promote_types(x.dtype, torch.float32))[order]
    decay, gain, extrapolation = _coefficients(process, timesteps)
    starts = _at(first, x.device).view(-1, 1, 1, 1)
    previous = torch.zeros_like(x)
    num_evaluations = 0
    for step in range(len(timesteps)):
        active = sum(index <= step for index in first)
        if not active:
            if first_call is not None and step >= first_call:
                denoise(x[:1], _times(timesteps[step], 1, x.device), order[:1])
            continue
        x_t = x[:active]
        x0 = denoise(x_t, _times(timesteps[step], active, x.device), order[:active]).to(x.dtype)
        num_evaluations += active
        target = x0
        if solver == "dpmpp_2m" and extrapolation[step]:
            weight = extrapolation[step] * (starts[:active] < step)
            target = x0 + weight * (x0 - previous[:active])
        previous[:active] = x0
        x[:active] = decay[step] * x_t + gain[step] * target
    return torch.empty_like(x).index_copy_(0, order, x), num_evaluations


def _at(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 on ``device``; made there at once (``torch.tensor(..., device=...)``) it would wait for the device."""
    return torch.tensor(values).to(device, non_blocking=True)


def _times(timestep: np.generic, batch: int, device: torch.device) -> Tensor:
    """t (B,) as the network takes it: int64 of a discrete process, float32 of a flow."""
    dtype = torch.int64 if isinstance(timestep, np.integer) else torch.float32
    return torch.full((batch,), timestep.item(), dtype=dtype, device=device)


def _coefficients(process: Process, timesteps: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """Per step: x_next = decay x_t + gain D, D = x0 + extrapolation (x0 - x0_previous); each of length K.

    decay = sigma'/sigma and gain = alpha' - alpha sigma'/sigma = -alpha' (exp(-h) - 1) with h the step in
    log-SNR lambda = log(alpha/sigma): both solvers share them, and neither divides by alpha. extrapolation =
    1/(2r) = h/(2 h_prev), 0 at the ends, where lambda is infinite.
    """
    alpha, sigma = _alpha_sigma(process, timesteps)
    decay, gain = ddim_coefficients(process, timesteps)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(np.append(alpha, 1.0)) - np.log(np.append(sigma, 0.0)))  # the last is infinite
    extrapolation = np.zeros(len(timesteps))
    extrapolation[1:-1] = h[1:-1] / (2 * h[:-2])
    return decay.tolist(), gain.tolist(), extrapolation.tolist()


def ddim_coefficients(process: Process, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """decay and gain (K,) of DDIM along a grid, float64: x_next = decay x_t + gain x0; the last step ends at the data.

    The x0 with which one step leads from x_t to a given x_next is therefore (x_next - decay x_t) / gain.
    """
    alpha, sigma = _alpha_sigma(process, timesteps)
    next_alpha, next_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    decay = next_sigma / sigma
    return decay, next_alpha - alpha * decay


def _alpha_sigma(process: Process, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    alpha, sigma = process.alpha_sigma(torch.from_numpy(timesteps), torch.float64)
    return alpha.flatten().numpy(), sigma.flatten().numpy()


@torch.no_grad()
def few_step_sample(
    denoise: Denoise,
    noises: Sequence[Tensor],
    timesteps: np.ndarray,
    process: Process,
    solver: str = "lcm",
    eta: float = 0.0,
    *,
    consistency: bool = True,
) -> Tensor:
    """Predict x0, go back to the next timestep, repeat; returns the last x0 (B, C, H, W).

    ``noises`` holds one (B, C, H, W) per timestep; the first is the starting point itself (pure noise). The
    prediction is combined with ``boundary_scalings`` as in training, unless the student is no ``consistency`` model.
    Same as diffusers' schedulers of these names on these timesteps.

    ``lcm``: the next timestep's noise is new (Luo et al., 2023, Alg. 3). ``ddim``: it is the noise that the prediction
    implies, of which ``eta`` replaces a part (Song et al., 2021, Eq. 12 and 16; 0: deterministic, 1: DDPM).
    """
    assert solver in FEW_STEP_SOLVERS and len(noises) == len(timesteps), (solver, len(noises), len(timesteps))
    rows = torch.arange(len(noises[0]), device=noises[0].device)
    x_t = noises[0]
    for step, timestep in enumerate(timesteps):
        t = _times(timestep, len(rows), x_t.device)
        x0 = denoise(x_t, t, rows)
        if consistency:
            c_skip, c_out = boundary_scalings(t)
            x0 = c_skip * x_t + c_out * x0
        if step + 1 == len(timesteps):
            break
        following, noise = _times(timesteps[step + 1], len(rows), x_t.device), noises[step + 1]
        if solver == "lcm":
            x_t = process.add_noise(x0, noise, following)
        else:
            x_t = _noisy_ddim_step(x_t, x0, noise, t, following, process, eta)
    return x0


@torch.no_grad()
def simulate(
    denoise: Denoise,
    noises: Sequence[Tensor],
    stop: Sequence[int],
    timesteps: np.ndarray,
    process: Process,
    calls: int | None = None,
) -> Tensor:
    """The state of the sampler ``lcm`` before its call ``stop`` (B,): x_t (B, C, H, W) at ``timesteps[stop]``.

    DMD2's backward simulation (Yin et al., 2024, Sec. 4.5): the student meets in training what it meets in sampling.
    ``noises`` are as those of ``few_step_sample``; stop 0 is the first of them, untouched. A sample that has arrived
    is not evaluated again, so the cost is the sum of the stops. ``calls``: how often ``denoise`` is called at least,
    for processes that must call a sharded network equally often; a call that nobody needs takes one sample.
    """
    start, last = [0] * len(stop), max(max(stop), calls or 0)
    return advance(denoise, noises[0], noises, start, stop, range(last), timesteps, process)


@torch.no_grad()
def advance(
    denoise: Denoise,
    x_t: Tensor,
    noises: Sequence[Tensor],
    start: Sequence[int],
    stop: Sequence[int],
    steps: range,
    timesteps: np.ndarray,
    process: Process,
) -> Tensor:
    """The state of the sampler ``lcm`` before its call ``stop`` (B,), from ``x_t``, its state before ``start`` (B,).

    ``steps``: the calls that are made, at least those that a sample needs; see ``simulate``.
    """
    x_t = x_t.clone()
    for step in steps:
        on_the_way = [row for row, (first, last) in enumerate(zip(start, stop, strict=True)) if first <= step < last]
        rows = _at(on_the_way or [0], x_t.device)
        t = _times(timesteps[step], len(rows), x_t.device)
        c_skip, c_out = boundary_scalings(t)
        x0 = c_skip * x_t[rows] + c_out * denoise(x_t[rows], t, rows)
        if on_the_way:
            following = _times(timesteps[step + 1], len(rows), x_t.device)
            x_t[rows] = process.add_noise(x0, noises[step + 1][rows], following)
    return x_t


def ddim_step(x_t: Tensor, x0: Tensor, t: Tensor, following: Tensor, process: Process) -> Tensor:
    """x at ``following`` (B,) that keeps the noise which ``x0`` implies (Song et al., 2021, Eq. 12, eta 0)."""
    alpha, sigma = process.alpha_sigma(t, x_t.dtype)
    alpha_next, sigma_next = process.alpha_sigma(following, x_t.dtype)
    return alpha_next * x0 + sigma_next * (x_t - alpha * x0) / sigma


def _noisy_ddim_step(
    x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor, following: Tensor, process: Process, eta: float
) -> Tensor:
    """x at ``following``: alpha' x0 + sigma' (direction and new noise), the latter's share as in DDPM times eta."""
    alpha, sigma = process.alpha_sigma(t, x_t.dtype)
    alpha_next, sigma_next = process.alpha_sigma(following, x_t.dtype)
    posterior = sigma_next / sigma * (sigma**2 - (alpha / alpha_next * sigma_next) ** 2).clamp(min=0).sqrt()
    fresh = eta * posterior
    direction = (x_t - alpha * x0) / sigma
    return alpha_next * x0 + (sigma_next**2 - fresh**2).sqrt() * direction + fresh * noise


def boundary_scalings(t: Tensor, sigma_data: float = 0.5, scale: float = 10.0) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B, 1, 1, 1) float32 of a consistency model (Luo et al., 2023): the identity at t = 0.

    ``t`` (B,) counts 0..999 (or 0..1000) and is multiplied by ``scale``: with t in [0, 1] c_skip would be far
    from 0 at every timestep that is sampled.
    """
    scaled = (scale * t.float()).view(-1, 1, 1, 1)
    norm = scaled**2 + sigma_data**2
    return sigma_data**2 / norm, scaled / norm.sqrt()
