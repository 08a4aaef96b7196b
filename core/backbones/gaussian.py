"""The exact oracle: a backbone whose data are a Gaussian mixture, so that everything has a closed form.

If x0 ~ sum_k w_k N(m_k, S_k), then x_t ~ sum_k w_k N(alpha m_k, C_k) with C_k = alpha^2 S_k + sigma^2 I, and

    E[x0 | x_t] = sum_k p(k | x_t) (m_k + alpha S_k C_k^-1 (x_t - alpha m_k)).

It checks solvers, losses and methods by value instead of by plausibility, and it is a backbone of the
ordinary contract. A prompt names components ("0", "0 2"); the empty prompt is the whole mixture, so guidance
is exact too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from core.backbones.base import TEACHER, Backbone, Cond, freeze
from core.config import UserError
from core.diffusion.process import Process

LOG_TWO_PI = math.log(2 * math.pi)


class GaussianMixture(nn.Module):
    """sum_k w_k N(mean_k, F_k F_k^T) in D dimensions; every number is a parameter.

    ``means`` (K, D); ``factors`` (K, D, D), any square root of the covariances; ``weights`` (K,), positive.
    In every method below ``x`` is (B, D), ``alpha`` and ``sigma`` are (B, 1), and ``components`` (B, K) masks
    the components that take part in each sample's mixture (default: all).
    """

    def __init__(self, means: Tensor, factors: Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        weights = torch.ones(len(means)) if weights is None else weights
        self.means, self.factors = nn.Parameter(means.clone()), nn.Parameter(factors.clone())
        self.log_weights = nn.Parameter(weights.to(means.dtype).log())

    def covariances(self) -> Tensor:
        """S_k, (K, D, D)."""
        return self.factors @ self.factors.mT

    def log_joint(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, components: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p(x_t, k) (B, K), normalised over the components taking part, and C_k^-1 (x_t - alpha m_k)."""
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        variance = (alpha**2)[:, None, None] * self.covariances() + (sigma**2)[:, None, None] * identity
        cholesky = torch.linalg.cholesky(variance)  # (B, K, D, D)
        residual = x[:, None] - alpha[:, None] * self.means
        whitened = torch.linalg.solve_triangular(cholesky, residual[..., None], upper=False)
        precise = torch.linalg.solve_triangular(cholesky.mT, whitened, upper=True)[..., 0]
        log_weights = self.log_weights.expand(len(x), -1)
        if components is not None:
            log_weights = log_weights.masked_fill(~components, -torch.inf)
        log_volume = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_gaussian = -0.5 * whitened.square().sum((-2, -1)) - log_volume - 0.5 * x.shape[1] * LOG_TWO_PI
        return log_weights.log_softmax(-1) + log_gaussian, precise

    def log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor, components: Tensor | None = None) -> Tensor:
        """log p(x_t), (B,)."""
        return self.log_joint(x, alpha, sigma, components)[0].logsumexp(-1)

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor, components: Tensor | None = None) -> Tensor:
        """E[x0 | x_t], (B, D)."""
        log_joint, precise = self.log_joint(x, alpha, sigma, components)
        pulled = torch.einsum("kij,bkj->bki", self.covariances(), precise)
        return torch.einsum("bk,bki->bi", log_joint.softmax(-1), self.means + alpha[:, None] * pulled)

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor, components: Tensor | None = None) -> Tensor:
        """grad_x log p(x_t) = -sum_k p(k | x_t) C_k^-1 (x_t - alpha m_k), (B, D); no division by sigma."""
        log_joint, precise = self.log_joint(x, alpha, sigma, components)
        return -torch.einsum("bk,bki->bi", log_joint.softmax(-1), precise)


class GaussianBackbone(Backbone):
    """Each role is a Gaussian mixture over latents (C, h, w); the teacher's is the target.

    Parameters and formulas are float64, so what is left is the rounding of the contract's float32. A role
    added later is a copy with its own parameters, so a student or a fake score is the exact denoiser of its
    own distribution. Images are (3, h, w) latents in [-1, 1]; others cannot be encoded or decoded.
    """

    def __init__(
        self,
        target: GaussianMixture,
        process: Process,
        prediction: str = "eps",
        latent_shape: tuple[int, int, int] = (3, 2, 2),
    ) -> None:
        super().__init__()
        assert int(np.prod(latent_shape)) == target.means.shape[1]
        self.process, self.prediction, self.latent_shape = process, prediction, latent_shape
        self.roles = nn.ModuleDict({TEACHER: copy.deepcopy(target).double()})
        freeze(self.roles.parameters())

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The exact prediction, converted from the posterior mean; also where alpha or sigma is 0."""
        alpha, sigma = (c.view(-1, 1) for c in self.process.alpha_sigma(t, torch.float64))
        flat, mixture, components = x_t.double().flatten(1), self.roles[role], cond.tensors["components"]
        x0 = mixture.denoise(flat, alpha, sigma, components)
        # E[eps | x_t] = -sigma score: through x0 it would be divided by sigma.
        eps = -sigma * mixture.score(flat, alpha, sigma, components)
        kinds = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
        return kinds[self.prediction].view_as(x_t).to(x_t.dtype)

    def network_features(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction itself: an oracle has no bottleneck."""
        return self.network(role, x_t, t, cond)

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        return self.latent_shape

    def add_role(
        self, role: str, like: str | None = None, *, trainable: bool, average: bool = False, seed: int = 0
    ) -> None:
        mixture = copy.deepcopy(self.roles[like or TEACHER])
        self.roles[role] = mixture.requires_grad_(trainable)

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        return dict(self.roles[role].named_parameters())

    def encode(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

    def pixels(self, latents: Tensor) -> Tensor:
        return latents.float()

    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """``components`` (B, K) bool; a prompt is the numbers of its components, "" is all of them."""
        num_components = len(self.roles[TEACHER].means)
        rows = torch.zeros(len(prompts), num_components, dtype=torch.bool)
        for row, prompt in zip(rows, prompts, strict=True):
            row[[_component(word, num_components) for word in prompt.split()] or slice(None)] = True
        return Cond({"components": rows})

    def networks(self) -> list[nn.Module]:
        return list(self.roles.values())

    def shard_units(self) -> list[nn.Module]:
        return []


def _component(word: str, num_components: int) -> int:
    if not word.isdigit() or int(word) >= num_components:
        raise UserError(f"prompt word {word!r} is not a component of the mixture: 0..{num_components - 1}")
    return int(word)


def ode_transport(
    x: Tensor, mean: Tensor, covariance: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Tensor:
    """End point (B, D) of the probability-flow ODE from x_t (B, D), if x0 ~ N(mean (D,), covariance (D, D)).

    ``start`` and ``end`` are (alpha, sigma), each (B, 1); the data are at (1, 0). In the eigenbasis the ODE
    keeps each standardised coordinate (x - alpha m)/sqrt(alpha^2 l + sigma^2), so the map is linear.
    """
    values, vectors = torch.linalg.eigh(covariance)
    (alpha, sigma), (to_alpha, to_sigma) = start, end
    gain = ((to_alpha**2 * values + to_sigma**2) / (alpha**2 * values + sigma**2)).sqrt()
    return to_alpha * mean + ((x - alpha * mean) @ vectors * gain) @ vectors.mT


def kl_divergence(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """KL(N(mean_1, cov_1) || N(mean_2, cov_2)), differentiable."""
    difference = mean_2 - mean_1
    quadratic = difference @ torch.linalg.solve(cov_2, difference) + torch.linalg.solve(cov_2, cov_1).trace()
    return 0.5 * (quadratic - len(mean_1) + torch.logdet(cov_2) - torch.logdet(cov_1))


def frechet_distance(mean_1: Tensor, factor_1: Tensor, mean_2: Tensor, factor_2: Tensor) -> Tensor:
    """Squared Frechet distance of N(mean_i, F_i F_i^T): the cross term is the nuclear norm of F_1^T F_2."""
    cross = torch.linalg.matrix_norm(factor_1.mT @ factor_2, ord="nuc")
    return (mean_1 - mean_2).square().sum() + factor_1.square().sum() + factor_2.square().sum() - 2 * cross
