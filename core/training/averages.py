"""Roles that follow another one as its moving average: of the student, of the score, whatever a method declares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from core.backbones.base import Backbone
from core.config import UserError
from core.methods.base import Role
from core.training.sharding import own_part


class Averages:
    """Moves each role that follows another once per update of that other, never on somebody else's turn.

    Made after sharding: of a parameter in parts each process moves its own.
    """

    def __init__(self, backbone: Backbone, roles: Iterable[Role]) -> None:
        self._backbone = backbone
        self._followers: dict[str, list[Role]] = defaultdict(list)
        for role in roles:
            if role.follows is not None:
                self._check_precision(role)
                self._followers[role.follows].append(role)

    def _check_precision(self, role: Role) -> None:
        """UserError where a network moves by less than its numbers can tell."""
        if any(part.dtype == torch.bfloat16 for part in self._backbone.role_parameters(role.name).values()):
            raise UserError(
                f"{role.name} follows {role.follows}, and most of its steps are too small for bf16; allowed for "
                "train.state_dtype: fp32"
            )

    @torch.no_grad()
    def move(self, followed: str | None, applied: Tensor) -> None:
        """``followed`` was updated; ``applied`` (scalar): 1, or 0 where the update was skipped."""
        for role in self._followers.get(followed, ()):
            source = self._backbone.role_parameters(followed)
            weight = (1 - role.decay) * applied
            for name, average in self._backbone.role_parameters(role.name).items():
                part = own_part(average)
                part.lerp_(own_part(source[name]).to(part.dtype), weight.to(part.dtype))
