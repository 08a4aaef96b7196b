"""Adapters of earlier rounds: added to the base's weights, and kept as one adapter beside the student's own.

Factors are by name, ``MODULE.lora_A.weight`` (rank, in, ...) and ``MODULE.lora_B.weight`` (out, rank, ...), as
``Roles.parameters`` gives them. Those that this module makes count in full: alpha / rank is part of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from core.config import UserError

A, B = ".lora_A.weight", ".lora_B.weight"


def in_full(factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The factors with ``scale`` = alpha / rank in them, fp32 on the host."""
    held = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in factors.items()}
    return {name: value * scale if name.endswith(B) else value for name, value in held.items()}


def stacked(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One adapter that adds what both add; its rank is the sum of theirs."""
    out = dict(first)
    for name, value in second.items():
        if name in first:
            value = torch.cat([first[name], value.to(first[name])], dim=0 if name.endswith(A) else 1)
        out[name] = value
    return out


@torch.no_grad()
def merge_into(network: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Add what the adapter adds to the weights of ``network``, in fp32; UserError where it is another network's."""
    for name in [name for name in factors if name.endswith(A)]:
        module = name.removesuffix(A)
        down, up = factors[name], factors.get(module + B)
        try:
            weight = network.get_submodule(module).weight
            added = torch.einsum("or,r...->o...", up.flatten(1), down).view(weight.shape)
        except (AttributeError, RuntimeError):
            message = f"the parent's adapter of {module} does not fit this backbone (another one, or another size)"
            raise UserError(message) from None
        # Memory of its own: that of a file may be shared with other processes
        weight.data = torch.empty_like(weight).copy_(weight.float() + added.to(weight.device))
