"""Teacher, student, fake score, ... as roles of one frozen base (``sharing: lora``) or as copies (``sharing: full``).

With LoRA the base is held once: the teacher is the base with adapters off, every other role an adapter. peft's own
``set_adapter`` and ``disable_adapters`` flip ``requires_grad`` of all adapters at each call, which would change what
trains several times a step; here a role only says which adapter the *forward* reads. The choice is part of the
recomputation under activation checkpointing: without that the backward pass recomputes with whichever adapter is
active then, and gradients are silently wrong.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.backbones.base import TEACHER, freeze
from core.backbones.merged import LIMIT_BYTES, MergedNetwork, merged_bytes
from core.backbones.precision import computing_as_now
from core.randomness import torch_seed

_ADAPTER = re.compile(r"\.lora_[AB]\.([^.]+)\.")  # in the name of a parameter: the role


@dataclass(frozen=True)
class Sharing:
    """The way in which roles share weights: ``lora`` (rank, alpha, targets: module name endings) or ``full``."""

    kind: str
    rank: int = 0
    alpha: int = 0
    targets: tuple[str, ...] = ()


@contextmanager
def keyed_init(*key: object) -> Iterator[None]:
    """Initialise modules inside from a key: identical on every rank, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(*key))
        yield


class Roles:
    """The roles of one network ``base``, which is frozen and is the teacher.

    ``aliased``: copies read the base's memory until they get their own. Sharding gives each block its own, as part of
    what it does; before that three copies of FLUX.2 dev would fit on few hosts, and on none once for each GPU.
    ``merging``: forwards that need no gradient of an adapter read weights that hold it, where they are few enough.
    """

    def __init__(self, base: nn.Module, sharing: Sharing) -> None:
        freeze(base.parameters())
        self.base = base.eval()
        self.sharing = sharing
        self.aliased = False
        self._copies: dict[str, nn.Module] = {}
        self._trainable: dict[str, bool] = {TEACHER: False}
        self._layers: list[BaseTunerLayer] = []
        self._current = TEACHER
        self.merging = True
        self._merged: dict[str, MergedNetwork] = {}
        self._prepare: Callable[[nn.Module], None] = lambda network: None
        self._are_few = False  # merged weights of one role
        self._stepping: tuple[str | None] | None = None  # the role that steps; None: any may

    def modules(self) -> list[nn.Module]:
        """The base and every copy of it."""
        return [self.base, *self._copies.values()]

    def __contains__(self, role: str) -> bool:
        return role in self._trainable

    def add(
        self,
        role: str,
        like: str | None,
        *,
        trainable: bool,
        average: bool = False,
        seed: int,
        drawn_as: str | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """Create ``role`` with the weights of ``like``, or (None) those that compute what the teacher computes.

        A copy that is an ``average`` is kept in fp32; adapters always are. An adapter is drawn as the role ``drawn_as``
        would be, in the size that ``sharing`` says (default: as the others).
        """
        assert role not in self, f"role {role} exists"
        if self.sharing.kind == "full":
            source = self.base if like in (None, TEACHER) else self._copies[like]
            self._copies[role] = self._copy(source)
            if average:
                self._copies[role].float()
        else:
            self._inject(role, (seed, drawn_as or role), sharing or self.sharing)
        self._trainable[role] = trainable
        if role in self._copies:
            self._copies[role].requires_grad_(trainable)
        else:
            for name, parameter in self.base.named_parameters():
                parameter.requires_grad_(self._trainable[_owner(name)])
        if like not in (None, TEACHER) and self.sharing.kind == "lora":
            theirs = self.parameters(like)
            with torch.no_grad():
                for name, parameter in self.parameters(role).items():
                    parameter.copy_(theirs[name])

    def _copy(self, network: nn.Module) -> nn.Module:
        own = {id(p): nn.Parameter(p.data, requires_grad=False) for p in network.parameters()} if self.aliased else {}
        return copy.deepcopy(network, own)

    def _inject(self, role: str, key: tuple[object, ...], sharing: Sharing) -> None:
        lora = LoraConfig(r=sharing.rank, lora_alpha=sharing.alpha, target_modules=list(sharing.targets), bias="none")
        with keyed_init(*key, "lora"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several roles are what we want
            inject_adapter_in_model(lora, self.base, adapter_name=role)
        freeze(self.base.parameters())  # injection unfreezes; `add` then sets what trains, once
        self._layers = [module for module in self.base.modules() if isinstance(module, BaseTunerLayer)]
        self._are_few = merged_bytes(self.base) <= LIMIT_BYTES
        self._merged.clear()  # their layers lack the new adapter's
        for layer in self._layers:
            for parameter in (*layer.lora_A[role].parameters(), *layer.lora_B[role].parameters()):
                parameter.data = parameter.data.float()
        current, self._current = self._current, ""
        self._activate(current)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own parameters; adapter names are stripped, so that roles of one kind share names."""
        if role in self._copies:
            return dict(self._copies[role].named_parameters())
        own = {}
        for name, parameter in self.base.named_parameters():
            if _owner(name) == role:
                own[name.replace(f".{role}.", ".")] = parameter
        return own

    def merged(self, role: str) -> nn.Module:
        """A network without adapters and with the role's weights: its copy, or the base's with the adapter added.

        Its weights are contiguous, as files hold them.
        """
        if role in self._copies:
            return self._copies[role].to(memory_format=torch.contiguous_format)
        network = copy.deepcopy(self.base)
        for name, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge(adapter_names=[role])
                owner, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(owner), leaf, layer.base_layer)
        return network.to(memory_format=torch.contiguous_format)

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """The module to call for ``role``; nothing but the forward's choice of weights changes."""
        assert role in self, f"unknown role {role}"
        previous = self._current
        self._activate(role)
        try:
            yield self._network(role)
        finally:
            self._activate(previous)

    def _network(self, role: str) -> nn.Module:
        if role in self._copies:
            return self._copies[role]
        if role == TEACHER or not self.merges or self._needs_gradients(role):
            return self.base
        return self.merged_network(role).current()

    def merged_network(self, role: str) -> MergedNetwork:
        """The weights that hold ``role``'s adapter, made when they are first asked for."""
        if role not in self._merged:
            self._merged[role] = MergedNetwork(self.base, role)
            self._prepare(self._merged[role].network)
        return self._merged[role]

    def when_merged(self, prepare: Callable[[nn.Module], None]) -> None:
        """Have ``prepare`` called with each network that holds an adapter, those that there are and those to come."""
        self._prepare = prepare
        for merged in self._merged.values():
            prepare(merged.network)

    def merge_again(self, role: str | None) -> None:
        """Make merged weights anew when they are asked for next, whatever versions of parameters say; None: of all."""
        for name, network in self._merged.items():
            if role in (None, name):
                network.forget()

    @property
    def merges(self) -> bool:
        """Whether forwards that need no gradients of an adapter read merged weights."""
        return self.merging and self._are_few

    def _needs_gradients(self, role: str) -> bool:
        steps = self._stepping is None or self._stepping == (role,)
        return torch.is_grad_enabled() and self._trainable[role] and steps

    @contextmanager
    def stepping(self, role: str | None) -> Iterator[None]:
        """Inside, no other role's parameters get gradients; None: nobody's."""
        previous, self._stepping = self._stepping, (role,)
        try:
            yield
        finally:
            self._stepping = previous

    def _activate(self, role: str) -> None:
        if role == self._current:
            return
        self._current = role
        chosen = {"_disable_adapters": role == TEACHER or role in self._copies}
        if not chosen["_disable_adapters"]:
            chosen["_active_adapter"] = [role]
        for (
            layer
        ) in self._layers:  # past ``Module.__setattr__``, which takes ten times as long, a thousand layers a call
            vars(layer).update(chosen)

    @contextmanager
    def _as_now(self, role: str, products: AbstractContextManager) -> Iterator[None]:
        with self.use(role), products:
            yield

    def checkpointing(self) -> Callable:
        """A gradient-checkpointing function that recomputes under the role of the forward."""

        # Blocks of UNets call it inside of what is compiled, where contexts cannot be traced: their parts are compiled
        @torch.compiler.disable(recursive=False)
        def run(function: Callable, *args: object) -> object:
            role = self._current

            def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
                return nullcontext(), self._as_now(role, computing_as_now())

            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

        return run


def _owner(name: str) -> str:
    """The role that a parameter of the base belongs to: its adapter's, or the teacher."""
    adapter = _ADAPTER.search(name)
    return adapter[1] if adapter else TEACHER
