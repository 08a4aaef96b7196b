"""The evaluations of networks that a step makes, noted and repeated alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.backbones.base import Backbone, Cond
from experiments.bench.timing import timed


@dataclass
class Call:
    """One evaluation of a network as the method made it."""

    function: Callable[..., Tensor]
    role: str
    x_t: Tensor
    t: Tensor
    cond: Cond
    grad: bool
    through: bool  # the gradient goes on to x_t: the role only judges

    @property
    def kind(self) -> str:
        """The role, half passes apart, and whether a backward pass follows."""
        half = " features" if self.function.__name__ == "network_features" else ""
        return f"{self.role}{half}{', with gradient' if self.grad else ''}"


class Recorder:
    """Notes the calls of a backbone's networks between ``start`` and ``stop``."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.calls, self.on = backbone, [], False
        for name in ("network", "network_features"):
            setattr(backbone, name, self._noting(getattr(backbone, name)))

    def _noting(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            if self.on:
                grad = torch.is_grad_enabled()
                self.calls.append(Call(function, role, x_t.detach(), t, cond, grad, grad and x_t.requires_grad))
            return function(role, x_t, t, cond)

        return call

    def replay(self) -> None:
        """Repeat the noted evaluations alone, with the backward passes that they had."""
        for call in self.calls:
            self._repeat(call)

    def seconds(self) -> Counter[str]:
        """Seconds of the noted evaluations by role, with and without gradient."""
        found: Counter[str] = Counter()
        for call in self.calls:
            found[call.kind] += timed(partial(self._repeat, call), call.x_t.device)
        return found

    def _repeat(self, call: Call) -> None:
        x_t = call.x_t.clone().requires_grad_(call.through)
        with torch.set_grad_enabled(call.grad), self.backbone._autocast(x_t):
            out = call.function(call.role, x_t, call.t, call.cond)
        if call.grad:
            inputs = [x_t] if call.through else list(self.backbone.role_parameters(call.role).values())
            trained = [value for value in inputs if value.requires_grad]
            out.float().square().mean().backward(inputs=trained)
            for value in trained:
                value.grad = None
