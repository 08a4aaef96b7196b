"""Muon (Jordan et al. 2024) for the embedded networks' matrices and convolutions, in float32.

``torch.optim.Muon`` orthogonalises in bfloat16, which CPUs without bfloat16 units emulate: 0.66 s a step on two
cores against 0.2 s here, beside about 1 s for the network itself. It also refuses convolutions.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Jordan et al.: singular values to about [0.7, 1.2] in five steps
ADAMW_RMS = 0.2  # of an AdamW update; Liu et al. 2025 (arXiv:2502.16982), Eq. 4: one learning rate for both


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Float32 (m, n) with the singular vectors of ``matrix`` and singular values near 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised over (out, in * kernel), scaled to the size of an AdamW update."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(average, group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * ADAMW_RMS * max(update.shape) ** 0.5)


class MuonAdamW:
    """Muon for every trainable matrix and convolution but embeddings, the first and the last layer; AdamW for these.

    ``outside``: parts of the names of the latter.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        outside: tuple[str, ...] = ("embedding", "conv_in", "conv_out"),
    ) -> None:
        hidden, others = [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_outside = parameter.ndim < 2 or any(part in name for part in outside)
            (others if is_outside else hidden).append(parameter)
        adamw = {"betas": (0.9, 0.99), "weight_decay": weight_decay, "foreach": True}
        self._parts: list[torch.optim.Optimizer] = [
            Muon(hidden, lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr, **adamw),
        ]

    def step(self, lr: float) -> None:
        """One update at this learning rate; the gradients are gone afterwards."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for part, saved in zip(self._parts, state, strict=True):
            part.load_state_dict(saved)
