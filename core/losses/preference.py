"""Step-level preferences between next states of a few-step sampler (Flash-DMD, stage 2).

From x_t the sampler ``lcm`` draws x_t' ~ N(alpha' x0, sigma'^2 I), where x0 is the student's estimate at x_t: for VP
N(sqrt(abar') x0, (1 - abar') I), for a flow N((1 - t') x0, t'^2 I). Several candidates are drawn from one x_t; a reward
model's best and worst are a pair, and the student learns which of them its own transition should have made likelier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.diffusion.process import Process
from core.schema import UserError


class NoPreference(UserError):
    """A reward that is not finite, or alike everywhere: there is nothing to prefer."""


def log_density(x: Tensor, x0: Tensor, t: Tensor, process: Process, *, mean: bool = False) -> Tensor:
    """log N(x; alpha_t x0, sigma_t^2 I) per sample (B,), at least float32; ``mean``: over dimensions, not their sum.

    ``x`` and ``x0`` (B, C, H, W); ``t`` (B,) is the time of ``x``.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, x0.dtype), torch.float32)
    alpha, sigma = process.alpha_sigma(t, dtype)
    standardised = (x.to(dtype) - alpha * x0.to(dtype)) / sigma
    each = -0.5 * standardised.square() - sigma.log() - 0.5 * math.log(2 * math.pi)
    each = each.flatten(1)
    return each.mean(1) if mean else each.sum(1)


def log_ratio(
    x: Tensor, x0: Tensor, reference_x0: Tensor, t: Tensor, process: Process, *, mean: bool = False
) -> Tensor:
    """log p(x | x0) / p(x | reference x0) per sample (B,), at least float32: the transitions' densities at one state.

    The difference of squares is written as a product: two log densities would cancel in float32.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, x0.dtype), torch.float32)
    alpha, sigma = process.alpha_sigma(t, dtype)
    x, x0, reference_x0 = x.to(dtype), x0.to(dtype), reference_x0.to(dtype)
    middle = x - 0.5 * alpha * (x0 + reference_x0)
    each = (alpha * (x0 - reference_x0) / sigma * (middle / sigma)).flatten(1)
    return each.mean(1) if mean else each.sum(1)


def preference_loss(win: Tensor, lose: Tensor, beta: float, clamp: float = 0.0) -> Tensor:
    """-log sigmoid(beta (win - lose)) per pair (B,) of two log ratios p / p_ref (B,).

    ``clamp`` c keeps each ratio within 1 - c and 1 + c, beyond which it has no gradient; 0: nothing is kept. Neighbours
    use 0.1 with densities averaged over dimensions.
    """
    if clamp:
        low, high = math.log1p(-clamp), math.log1p(clamp)
        win, lose = win.clamp(low, high), lose.clamp(low, high)
    return -F.logsigmoid(beta * (win - lose))


@dataclass(frozen=True)
class Pairs:
    """The best and the worst candidate of each sample, (B,) indices, and where they differ enough, (B,) bool."""

    best: Tensor
    worst: Tensor
    counts: Tensor

    def of(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Both of ``candidates`` (B, k, ...), each (B, ...)."""
        rows = torch.arange(len(candidates), device=candidates.device)
        return candidates[rows, self.best], candidates[rows, self.worst]


def choose_pairs(rewards: Tensor, min_gap: float = 0.0) -> Pairs:
    """Pairs by rewards (B, k); one counts if best and worst differ, and by at least ``min_gap``."""
    high, low = rewards.max(1), rewards.min(1)
    gap = high.values - low.values
    return Pairs(high.indices, low.indices, (gap > 0) & (gap >= min_gap))


def check_rewards(rewards: Tensor, name: str) -> None:
    """Raise NoPreference where a reward model's values (B, k) can teach nothing; reads them on the host."""
    bad, low, high = torch.stack([(~torch.isfinite(rewards)).sum(), rewards.min(), rewards.max()]).tolist()
    if bad:
        raise NoPreference(
            f"{name}: {int(bad)} of {rewards.numel()} rewards are not finite; nothing was learned from them"
        )
    if low == high:
        raise NoPreference(
            f"{name}: all {rewards.numel()} rewards are {low:g}; a constant prefers nothing, as of an untrained model"
        )


def bradley_terry(better: Tensor, worse: Tensor) -> Tensor:
    """-log sigmoid(better - worse) per pair (B,), float32: the first of two scores should be the larger."""
    return F.softplus(worse.float() - better.float())
