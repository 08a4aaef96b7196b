"""One trained player: optimizer step, clipping, skipping of non-finite steps, moving average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from core.methods.base import Player


class TrainedPlayer:
    """Owns the optimizer of a ``Player``; ``ema`` (fp32) moves once per update of this player, never on another's turn.

    A step whose gradient norm is not finite is skipped by the fused optimizer's ``found_inf`` flag: on the device,
    without reading it on the host. One such batch would poison a LoRA for ever.
    """

    def __init__(self, player: Player, max_grad_norm: float, ema: Mapping[str, nn.Parameter], ema_decay: float) -> None:
        self.name = player.name
        self.parameters = dict(player.parameters)
        self.trained = list(self.parameters.values())
        self.max_grad_norm = max_grad_norm
        self.ema, self.ema_decay = dict(ema), ema_decay
        self.weight_clip = player.optimizer.weight_clip
        settings = player.optimizer
        self.lr = settings.lr
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=self.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        device = next(iter(self.parameters.values())).device
        self.skipped_in_row = torch.zeros((), device=device)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        """Those that this turn has made; the same list in every process."""
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]

    def step(self, lr_factor: float = 1.0) -> Tensor:
        """Clip, update at ``lr_factor`` of the learning rate, average; the gradient norm before clipping, on device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        not_finite = (~torch.isfinite(norm)).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, not_finite
        self.optimizer.step()
        if self.weight_clip is not None:
            with torch.no_grad():
                torch._foreach_clamp_min_(self.trained, -self.weight_clip)
                torch._foreach_clamp_max_(self.trained, self.weight_clip)
        self.skipped_in_row = (self.skipped_in_row + 1) * not_finite
        if self.ema:
            self._average((1 - self.ema_decay) * (1 - not_finite))
        return norm

    @torch.no_grad()
    def _average(self, weight: Tensor) -> None:
        for name, average in self.ema.items():
            average.lerp_(self.parameters[name].to(average.dtype), weight.to(average.dtype))

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, as flat named tensors."""
        out = {f"{self.name}/parameter/{name}": value for name, value in self.parameters.items()}
        out |= {f"{self.name}/ema/{name}": value for name, value in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                out[f"{self.name}/{key}/{name}"] = value
        return {key: value.detach().cpu().contiguous() for key, value in out.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Exact inverse of ``state``; a missing or misshapen tensor is a KeyError or RuntimeError (corrupt state)."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"{self.name}/parameter/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"{self.name}/{key}/{name}")
                if value is not None:
                    # clone: a loaded tensor may be an unaligned view of the file, and vector code rounds differently
                    self.optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
        for name, average in self.ema.items():
            average.copy_(state[f"{self.name}/ema/{name}"])
