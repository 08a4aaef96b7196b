"""Noising processes x_t = alpha_t x0 + sigma_t eps, and conversions between the four prediction kinds.

Kinds: ``x0``; ``eps``; ``v`` = alpha eps - sigma x0 (Salimans & Ho, 2022); ``flow`` = eps - x0.
``t`` is (B,), in the network's own units: VP 0..T-1 (integers), flow 0..1000 (t = 1000 sigma).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import UserError
from core.diffusion.timesteps import trailing_timesteps

KINDS = ("x0", "eps", "v", "flow")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class Process(ABC):
    """A noising process; ``num_train_timesteps`` is the T of the network's time units."""

    num_train_timesteps: int

    @abstractmethod
    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each (B, 1, 1, 1) on the device of ``t`` (B,)."""

    @abstractmethod
    def timestep(self, fraction: Tensor) -> Tensor:
        """Noise fractions in [0, 1) -> t: uniform fractions give uniform times, none piled on an end."""

    @abstractmethod
    def timesteps(self, num_steps: int) -> np.ndarray:
        """The K-step grid, from full noise down, (K,); index 0 is full noise."""

    @abstractmethod
    def divided(self, num_steps: int, parts: int) -> np.ndarray:
        """``timesteps(num_steps)`` with each of its steps cut into ``parts`` of equal length, (num_steps parts,)."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, H, W), at least float32."""
        dtype = torch.promote_types(x0.dtype, torch.float32)
        alpha, sigma = self.alpha_sigma(t, dtype)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor, kind: str) -> Tensor:
        """The perfect prediction of ``kind`` for the pair (x0, eps); (B, C, H, W), at least float32."""
        alpha, sigma = self.alpha_sigma(t, torch.promote_types(x0.dtype, torch.float32))
        of_x0, of_eps = _components(kind, alpha, sigma)
        return of_x0 * x0 + of_eps * eps

    def convert(self, pred: Tensor, x_t: Tensor, t: Tensor, from_: str, to: str) -> Tensor:
        """Turn a prediction of kind ``from_`` into kind ``to``, at least in float32; shapes (B, C, H, W).

        Each kind is a combination p x0 + q eps. With x_t = alpha x0 + sigma eps this is a 2x2 system of
        determinant D = alpha q - sigma p, and ``to`` = P x0 + Q eps is c x_t + d pred with c = (P q - Q p)/D
        and d = (alpha Q - sigma P)/D. For v and flow D is alpha^2 + sigma^2 and alpha + sigma, never small,
        so no conversion out of them passes through eps or x0 and divides by a small number. D = 0 only where
        ``from_`` says nothing about the other component (eps at alpha = 0, x0 at sigma = 0): that component
        is taken as its mean, 0 (exact for eps).
        """
        dtype = torch.promote_types(pred.dtype, torch.float32)
        pred, x_t = pred.to(dtype), x_t.to(dtype)
        if from_ == to:
            return pred
        alpha, sigma = self.alpha_sigma(t, dtype)
        p, q = _components(from_, alpha, sigma)
        to_p, to_q = _components(to, alpha, sigma)
        determinant = alpha * q - sigma * p
        blind = determinant == 0
        safe = torch.where(blind, 1.0, determinant)
        of_x_t = torch.where(blind, 0.0, (to_p * q - to_q * p) / safe)
        of_pred = torch.where(blind, to_p * p + to_q * q, (alpha * to_q - sigma * to_p) / safe)
        return of_x_t * x_t + of_pred * pred


def _components(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of ``kind`` = p x0 + q eps."""
    assert kind in KINDS, kind
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {"x0": (one, zero), "eps": (zero, one), "v": (-sigma, alpha), "flow": (-one, one)}[kind]


class VPProcess(Process):
    """Variance-preserving, discrete: alpha_t^2 = prod_{s<=t} (1 - beta_s), alpha^2 + sigma^2 = 1."""

    def __init__(self, alphas_cumprod: np.ndarray) -> None:
        alphas_cumprod = np.asarray(alphas_cumprod, dtype=np.float64)
        self.num_train_timesteps = len(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod  # (T,) float64
        table = np.stack([np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)])
        self._table = torch.from_numpy(table)  # (2, T) float64
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VPProcess:
        """The process of a diffusers scheduler's config; raises UserError for an unknown beta schedule."""
        betas = _betas(config)
        alphas_cumprod = np.cumprod(1 - betas)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod)

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        key = (t.device, dtype)
        if key not in self._placed:  # converted before moving: not every device has float64
            self._placed[key] = self._table.to(dtype).to(t.device, non_blocking=True)
        alpha, sigma = self._placed[key][:, t.long()].view(2, -1, 1, 1, 1)
        return alpha, sigma

    def timestep(self, fraction: Tensor) -> Tensor:
        return (fraction * self.num_train_timesteps).long()

    def timesteps(self, num_steps: int) -> np.ndarray:
        return trailing_timesteps(num_steps, self.num_train_timesteps)

    def divided(self, num_steps: int, parts: int) -> np.ndarray:
        fine = trailing_timesteps(num_steps * parts, self.num_train_timesteps)
        fine[::parts] = self.timesteps(num_steps)  # rounded alike
        return fine


class FlowProcess(Process):
    """Rectified flow: alpha = 1 - sigma, sigma = t/1000. ``shift`` moves times to noise (SD3, Eq. 23).

    ``shift_of``: the shift of a grid of so many steps, where it depends on them (FLUX.2); default: ``shift``.
    """

    num_train_timesteps = 1000

    def __init__(self, shift: float = 1.0, shift_of: Callable[[int], float] | None = None) -> None:
        self.shift = shift
        self.shift_of = shift_of or (lambda num_steps: shift)

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        # Divided in float64 where t allows it: 1 - sigma loses what float32 rounds.
        sigma = (t.to(torch.promote_types(t.dtype, dtype)) / self.num_train_timesteps).view(-1, 1, 1, 1)
        return (1 - sigma).to(dtype), sigma.to(dtype)

    def timestep(self, fraction: Tensor) -> Tensor:
        return (self.num_train_timesteps * _shifted(fraction, self.shift)).float()

    def timesteps(self, num_steps: int) -> np.ndarray:
        return self.divided(num_steps, 1)

    def divided(self, num_steps: int, parts: int) -> np.ndarray:
        total = num_steps * parts
        return self.num_train_timesteps * _shifted(1 - np.arange(total) / total, self.shift_of(num_steps))


def _shifted(sigma: Any, shift: float) -> Any:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    """beta_t (T,) float64, by diffusers' names of the schedules and its defaults."""
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float64)
    num = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if schedule == "linear":
        return np.linspace(start, end, num)
    if schedule == "scaled_linear":  # latent diffusion: linear in the square root
        return np.linspace(start**0.5, end**0.5, num) ** 2
    if schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal (2021), Eq. 17
        alpha_bar = np.cos((np.arange(num + 1) / num + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise UserError(f"scheduler config: beta_schedule={schedule!r} is not one of {', '.join(BETA_SCHEDULES)}")


def _zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Scale sqrt(alpha_bar) to end at 0 and start where it did (Lin et al., 2023, Alg. 1)."""
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
