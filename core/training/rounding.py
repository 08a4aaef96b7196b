"""AdamW whose parameters and moments are bf16, rounded up or down by chance.

A bf16 number has 8 significant bits. Rounded to nearest, an update smaller than 1/512 of its parameter is lost, and so
is every change of a second moment that decays by 0.999: it stays where it is. Rounded up with the probability of what
would be cut off, both are right on average.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from core.randomness import torch_seed


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 neighbours of ``values`` (fp32), each with the probability of its nearness."""
    bits = values.contiguous().view(torch.int32)
    chance = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + chance) & -(1 << 16)).view(torch.float32).bfloat16()  # the lower 16 bits are what bf16 cuts off


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) in fp32 arithmetic on bf16 numbers.

    As ``torch.optim.AdamW(fused=True)`` it skips an update where ``found_inf`` is 1, and does not count it in ``step``.
    The rounding's draws are keyed by the parameter's one of ``keys``, its index and the number of calls (``draws``, on
    the host, which does not know what was skipped): no generator state is saved. They are drawn in the shape that is
    here, so other shards of a parameter are rounded by other draws: with another number of sharded processes a run is
    the same on average, not bit for bit. Processes need different keys for parameters of which they hold different
    shards, and the same for those that each of them holds whole.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: Sequence[float],
        weight_decay: float,
        keys: Sequence[tuple[object, ...]],
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "eps": eps})
        self.keys = keys

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, index)

    def _update(self, parameter: Tensor, group: dict, index: int) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if "draws" not in state:  # older states counted in "step" what they skipped
            state["draws"] = state["step"].to("cpu", copy=True)
        state["draws"] += 1
        draws = int(state["draws"].item())  # on the host: no synchronisation
        seed = torch_seed(*self.keys[index], "rounding", draws, index)
        generator = torch.Generator(parameter.device).manual_seed(seed)
        step = (state["step"] + 1).double()
        gradient = parameter.grad.float()
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        moved = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        moved.addcdiv_(mean * (-group["lr"] / (1 - beta1**step)), denominator)
        skip = torch.zeros_like(state["step"]) if self.found_inf is None else self.found_inf.to(parameter.device)
        state["step"] += 1 - skip
        for target, value in ((parameter, moved), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            target.copy_(torch.where(skip.bool(), target, stochastic_round(value, generator)))
