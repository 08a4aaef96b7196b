"""Networks whose weights hold a role's adapter: what forwards read that need no gradient of the adapter.

At each layer an adapter costs two more products and reads the input twice; added to the weights it costs nothing. The
sum is made anew from the frozen base and the adapter whenever the adapter has changed, in fp32, so that it never
drifts, and is stored as the base is. In bf16 the rounding of activations is the larger error by far: the difference of
a fake score and its teacher is as exact by merged weights as by adapters (``test_merged.py``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

LIMIT_BYTES = 10**9  # of one role's merged weights; beyond it the memory is worth more than the time


@dataclass(frozen=True)
class _Layer:
    """One adapted layer: the weight of the base, the adapter, and their sum."""

    base: nn.Parameter
    adapter: BaseTunerLayer
    merged: nn.Parameter


class MergedNetwork:
    """The network of ``base`` with ``role``'s adapter in its weights; all that has no adapter is the base's memory."""

    def __init__(self, base: nn.Module, role: str) -> None:
        self.role = role
        self.network = copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
        self._layers: list[_Layer] = []
        self._seen: list[tuple[int, int]] = []
        for name, adapter in list(self.network.named_modules()):
            if isinstance(adapter, BaseTunerLayer):
                self._replace(name, adapter)

    def _replace(self, name: str, adapter: BaseTunerLayer) -> None:
        layer = adapter.base_layer
        base = layer.weight
        layer.weight = nn.Parameter(torch.empty_like(base), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(self.network.get_submodule(owner), leaf, layer)
        self._layers.append(_Layer(base, adapter, layer.weight))

    def parameters(self) -> list[nn.Parameter]:
        """The weights that are not the base's memory."""
        return [layer.merged for layer in self._layers]

    def current(self) -> nn.Module:
        """The network with the weights that the adapter has now."""
        seen = [_version(parameter) for layer in self._layers for parameter in self._parameters(layer)]
        if seen != self._seen:
            self._merge()
            self._seen = seen
        return self.network

    def forget(self) -> None:
        """Merge at the next call, whatever the versions of the parameters say."""
        self._seen = []

    def _parameters(self, layer: _Layer) -> tuple[nn.Parameter, ...]:
        return layer.base, layer.adapter.lora_A[self.role].weight, layer.adapter.lora_B[self.role].weight

    @torch.no_grad()
    def _merge(self) -> None:
        for layer in self._layers:
            layer.merged.copy_(layer.base.float() + layer.adapter.get_delta_weight(self.role))


def _version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is given other memory, or is written to by most of torch (fused optimizers do not)."""
    return tensor.untyped_storage()._cdata, tensor._version


def merged_bytes(base: nn.Module) -> int:
    """Bytes of one role's merged weights."""
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    return sum(layer.base_layer.weight.numel() * layer.base_layer.weight.element_size() for layer in layers)
