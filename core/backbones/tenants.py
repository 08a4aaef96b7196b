"""Several trainings on one base: each has roles of its own under its own names, and the teacher is everybody's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from core.backbones.base import TEACHER
from core.backbones.merged import MergedNetwork
from core.backbones.roles import Roles, Sharing


class OwnRoles:
    """The roles of one ``owner`` among all that lie on ``shared``; otherwise as ``Roles``.

    ``sharing``: its adapters may have another size than those of the others. What is not about a role by name is that
    of all together.
    """

    def __init__(self, shared: Roles, owner: str, sharing: Sharing) -> None:
        self._shared, self._owner, self.sharing = shared, owner, sharing
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    def __contains__(self, role: str) -> bool:
        return self._name(role) in self._shared

    def _name(self, role: str) -> str:
        """The role's name among those of all owners."""
        return role if role == TEACHER else f"{role} of {self._owner}"

    def add(self, role: str, like: str | None, *, trainable: bool, average: bool = False, seed: int) -> None:
        """Create a role; an adapter starts as it would if nobody else were there."""
        source = None if like is None else self._name(like)
        options = {"average": average, "seed": seed, "drawn_as": role, "sharing": self.sharing}
        self._shared.add(self._name(role), source, trainable=trainable, **options)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own parameters, looked for once: a base with many adapters has many thousands."""
        if role not in self._parameters:
            self._parameters[role] = self._shared.parameters(self._name(role))
        return dict(self._parameters[role])

    def merged(self, role: str) -> nn.Module:
        """A network without adapters and with the role's weights."""
        return self._shared.merged(self._name(role))

    def use(self, role: str) -> AbstractContextManager[nn.Module]:
        """The module to call for ``role``."""
        return self._shared.use(self._name(role))

    def stepping(self, role: str | None) -> AbstractContextManager[None]:
        """Inside, no other role's parameters get gradients; None: nobody's."""
        return self._shared.stepping(None if role is None else self._name(role))

    def merge_again(self, role: str | None) -> None:
        """Make the merged weights of a role anew when they are asked for next; None: of everybody's."""
        self._shared.merge_again(None if role is None else self._name(role))

    def merged_network(self, role: str) -> MergedNetwork:
        """The weights that hold the role's adapter."""
        return self._shared.merged_network(self._name(role))
