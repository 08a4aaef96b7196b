"""One trained player: optimizer step, clipping, skipping of steps that are not finite."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from core.methods.base import Player
from core.training.rounding import StochasticAdamW
from core.training.sharding import DTensor, gradient_norm, like, own_part, part_of

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "draws")


class TrainedPlayer:
    """Owns the optimizer of a ``Player``; ``applied``: 1 after an update, 0 after one that was skipped.

    A step whose gradient norm is not finite is skipped by the fused optimizer's ``found_inf`` flag: on the device,
    without reading it on the host. One such batch would poison a LoRA for ever. Of sharded parameters the optimizer
    sees this process's part.
    """

    def __init__(
        self,
        player: Player,
        max_grad_norm: float,
        state_dtype: str = "fp32",
        key: tuple[object, ...] = (),
    ) -> None:
        self.name, self.role = player.name, player.role
        self.parameters = dict(player.parameters)
        self.trained = list(self.parameters.values())
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.trained)
        self.parts = [own_part(parameter) for parameter in self.trained]
        self.max_grad_norm = max_grad_norm
        settings = player.optimizer
        self.weight_clip, self.lr = settings.weight_clip, settings.lr
        common = {"lr": self.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
        if state_dtype == "bf16_stochastic":
            keys = [(*key, self.name, *((dist.get_rank(),) if isinstance(p, DTensor) else ())) for p in self.trained]
            self.optimizer: torch.optim.Optimizer = StochasticAdamW(self.parts, keys=keys, **common)
        else:
            self.optimizer = torch.optim.AdamW(self.parts, fused=True, **common)
        self.skipped_in_row = torch.zeros((), device=self.parts[0].device)
        self.applied = torch.ones((), device=self.parts[0].device)

    def zero_grad(self) -> None:
        for parameter, part in zip(self.trained, self.parts, strict=True):
            parameter.grad = part.grad = None

    def gradients(self) -> list[Tensor]:
        """Gradients of this turn that the processes still have to average; the same list in each."""
        return [p.grad for p in self.trained if p.grad is not None and not isinstance(p, DTensor)]

    def step(self, lr_factor: float = 1.0) -> Tensor:
        """Clip, then update at ``lr_factor`` of the learning rate; the gradient norm before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        norm = self._clip()
        not_finite = (~torch.isfinite(norm)).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, not_finite
        self.optimizer.step()
        if self.weight_clip is not None:
            with torch.no_grad():
                torch._foreach_clamp_min_(self.parts, -self.weight_clip)
                torch._foreach_clamp_max_(self.parts, self.weight_clip)
        self.skipped_in_row = (self.skipped_in_row + 1) * not_finite
        self.applied = 1 - not_finite
        return norm

    def _clip(self) -> Tensor:
        """Scale the gradients to ``max_grad_norm`` where they are longer, as ``clip_grad_norm_``; their norm before."""
        if not self.sharded:
            return torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        norm = gradient_norm(self.trained)
        for parameter, part in zip(self.trained, self.parts, strict=True):
            if parameter.grad is not None:
                part.grad = own_part(parameter.grad)
        found = [part.grad for part in self.parts if part.grad is not None]
        torch._foreach_mul_(found, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, as flat named tensors that share memory with what they name."""
        out = {f"{self.name}/parameter/{name}": value.detach() for name, value in self.parameters.items()}
        for (name, parameter), part in zip(self.parameters.items(), self.parts, strict=True):
            for key, value in self.optimizer.state[part].items():
                out[f"{self.name}/{key}/{name}"] = like(value, parameter.detach())
        return out

    def make_room(self, names: Collection[str]) -> None:
        """Create the moments that a state of these names holds, to be filled in place."""
        for name, part in zip(self.parameters, self.parts, strict=True):
            if f"{self.name}/step/{name}" in names:
                step = torch.zeros((), device=part.device)
                moments = {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}
                draws = {"draws": torch.zeros(())} if f"{self.name}/draws/{name}" in names else {}
                self.optimizer.state[part] = {"step": step} | moments | draws

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Exact inverse of ``state``; a missing or misshapen tensor is a KeyError or RuntimeError (of another run)."""
        for (name, parameter), part in zip(self.parameters.items(), self.parts, strict=True):
            part.copy_(part_of(state[f"{self.name}/parameter/{name}"], parameter))
            for key in MOMENTS:
                value = state.get(f"{self.name}/{key}/{name}")
                if value is not None:
                    # clone: a loaded tensor may be an unaligned view of the file, and vector code rounds differently
                    device = "cpu" if key == "draws" else part.device
                    self.optimizer.state[part][key] = part_of(value, parameter).to(device, copy=True)
