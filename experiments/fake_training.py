"""A training without numbers: networks built from their architecture alone, and what lives in one fake iteration.

Activations come from counting what lives during one micro-batch of every turn on fake tensors (torch's own MemTracker
takes neither frozen parameters nor a network that is called several times).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from core.backbones.base import Cond
from core.backbones.pipeline import SCHEDULER, PipelineBackbone, read_json
from core.config import ExperimentConfig, UserError
from core.data.batches import Batch
from core.identity import locate
from core.methods.base import Method, total
from core.methods.clock import Clock
from core.training.loop import micro_batch
from experiments.architectures import architectures
from experiments.build import FAMILIES, METHODS, compute_dtype, place_players, sharing_of, storage_dtype
from experiments.parents import merges_parent


def build(config: ExperimentConfig) -> Method:
    """The method on the meta device; UserError for an unknown architecture."""
    family, known = FAMILIES[config.backbone.family], _architecture(config)
    with torch.device("meta"):
        backbone = family.from_architecture(
            known["network"],
            known["scheduler"],
            sharing_of(config),
            vae=known["vae"],
            image_size=config.data.image_size,
            guidance_embedding=config.backbone.guidance_embedding,
        )
        # Not `.to`: diffusers warns of modules that it keeps in fp32
        for parameter in backbone.roles.base.parameters():
            parameter.data = parameter.data.to(storage_dtype(config))
        backbone.merged_parent = {} if merges_parent(config) else None
        backbone.compute_dtype, backbone.device = compute_dtype(config), torch.device("meta")
        method = METHODS[config.method.name](config.method, backbone, config.seed, ema_decay=config.train.ema_decay)
        place_players(method, config)
    return method


def _architecture(config: ExperimentConfig) -> dict[str, Any]:
    """The published pipeline of this hub id, else the one described in a folder."""
    spec = config.backbone
    network_folder, folder = FAMILIES[spec.family].network_folder, locate(spec.path)
    if spec.path in architectures():
        return architectures()[spec.path]
    files = {
        "network": f"{network_folder}/config.json", "vae": "vae/config.json",
        "scheduler": SCHEDULER, "tokenizer": "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    missing = [file for file in files.values() if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"backbone.path={spec.path}: neither a folder with {missing[0]} nor one of " + ", ".join(architectures())
        )
    found = {name: read_json(str(folder), file, None) for name, file in files.items()}
    plain = {name: {k: v for k, v in values.items() if not k.startswith("_")} for name, values in found.items()}
    return {**plain, "tokens": found["tokenizer"].get("model_max_length")}


def frozen_beside(method: Method) -> dict[str, nn.Module]:
    """Frozen networks that a loss reads beside the backbone's, by name, and the VAE that decodes for them."""
    found: dict[str, nn.Module] = {}
    for name, network in method.networks_beside().items():
        if not any(parameter.requires_grad for parameter in network.parameters()):
            found[name] = network
    return {"vae": method.backbone.vae, **found} if found else {}


@dataclass(frozen=True)
class Lived:
    """``peak``: most bytes beside parameters, gradients and moments at any moment of an iteration with all turns.
    ``reached``: by turn, the networks' parameters of which its backward pass computes gradients."""

    peak: int
    reached: dict[str, list[nn.Parameter]]


def iteration(config: ExperimentConfig, num_devices: int, checkpointing: bool, sharded: bool) -> Lived:
    """Peak memory and gradients on one of ``num_devices`` in an iteration in which every player has its turn.

    It is one of the last stage: in the first ones terms may have no weight yet.
    """
    clock, method = Clock(1, "images", config.train.batch_size, student_images=1), build(config)
    backbone = method.backbone
    method.solutions = SolvedBefore(backbone.latent_shape)
    if checkpointing:
        backbone.enable_activation_checkpointing()
    beside = list((method.networks_beside() | frozen_beside(method)).values())
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda():
        _materialise(backbone.networks(), backbone.compute_dtype if sharded else None)  # as they are gathered
        _materialise(beside, None)
        backbone.device = torch.device("cpu")
        modules = (*backbone.networks(), *beside)
        held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        live = LiveBytes([*held, *_merged(method, sharded)])
        trained = {player.name: list(player.parameters.values()) for player in method.players()}
        roles = {player.name: player.role for player in method.players()}
        every = [parameter for parameters in trained.values() for parameter in parameters]
        for parameter in every:
            parameter.register_post_accumulate_grad_hook(lambda p: live.forget(p.grad))  # has a row of its own
        reached = {}
        with live:
            batch = _fake_batch(backbone, _architecture(config)["tokens"], config.train.batch_size // num_devices)
            rollout = method.rollout(batch.split(micro_batch(config, num_devices))[0], clock)
            for turn in method.turns(clock):
                with backbone.stepping(roles[turn.player]):
                    terms = method.losses(turn.name, rollout, clock)
                loss = total(terms, method.weights(turn.name, clock))
                loss.backward(inputs=None if sharded else trained[turn.player])  # as the trainer
                del loss, terms
                networks = [parameter for network in backbone.networks() for parameter in network.parameters()]
                reached[turn.name] = [parameter for parameter in networks if parameter.grad is not None]
                for parameter in every:
                    parameter.grad = None
    return Lived(live.peak, reached)


def _merged(method: Method, sharded: bool) -> list[nn.Parameter]:
    """Weights that hold adapters, which have rows of their own; none where parameters lie in parts."""
    backbone = method.backbone
    if sharded:
        backbone.keep_adapters_apart()
    if not backbone.merged_bytes:
        return []
    return [weight for role in method.roles() for weight in backbone.roles.merged_network(role.name).parameters()]


class SolvedBefore:
    """Stands for the store of teacher solutions and gives zeros. A real solve cannot run on fake tensors, which have no
    numbers to decide its steps; nor is it missed, since it keeps no activations and peaks below every turn."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def fetch(self, positions: np.ndarray, compute: object) -> tuple[Tensor, bool]:
        return torch.zeros(len(positions), *self.shape), True


def _materialise(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> None:
    """Fake tensors in place of those of the meta device, parameters in ``dtype``; call it in a ``FakeTensorMode``."""
    for module in modules:
        for part in module.modules():
            _materialise_part(part, dtype)


def _materialise_part(part: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace what ``part`` itself holds; its children are parts of their own."""
    for name, value in part._parameters.items():
        if value is not None:
            fake = torch.empty(value.shape, dtype=dtype or value.dtype, device="cpu")
            part._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
    for name, value in part._buffers.items():
        if value is not None:
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cpu")


def _fake_batch(backbone: PipelineBackbone, tokens: int, size: int) -> Batch:
    cond = Cond({name: torch.zeros(size, *shape) for name, shape in backbone.cond_shapes(tokens).items()})
    return Batch(np.arange(size), torch.zeros(size, *backbone.latent_shape), cond, cond[slice(0, 1)])


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Keep on fake tensors of the CPU what CUDA keeps (those of CUDA have no backward pass without a GPU).

    Attention is fused, also where ``computing_in`` prefers matrix products on a CPU: kept are q, k, v, the output and
    its logsumexp, no L x L matrix. Autocast computes norms and resizing in fp32 (torch's AT_FORALL_FP32), which that of
    the CPU leaves in 16 bit. An RMS norm is one operation, which keeps what a layer norm does, but for the means. The
    functions are replaced: a TorchFunctionMode would be off in the backward pass, in which blocks are computed again.
    """
    kept = {name: getattr(F, name) for name in ("group_norm", "layer_norm", "rms_norm", "interpolate")}
    attention = F.scaled_dot_product_attention
    for name, function in kept.items():
        setattr(F, name, _in_fp32(function))
    layer_norm = F.layer_norm
    F.rms_norm = lambda x, shape, weight=None, eps=None: layer_norm(x, shape, weight)
    F.scaled_dot_product_attention = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])(attention)
    try:
        yield
    finally:
        vars(F).update(kept | {"scaled_dot_product_attention": attention})


def _in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    return call


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations inside have made and that are still referred to; ``peak``: at most.

    ``others`` are counted elsewhere: views of them are nothing new.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storages, and the bytes counted for each
        for tensor in others:
            self._known[tensor.untyped_storage()] = [0]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        count = [storage.nbytes()]
        self._known[storage] = count
        weakref.finalize(storage, self._take, count)
        self.now += count[0]
        self.peak = max(self.peak, self.now)

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor no longer."""
        count = self._known.get(tensor.untyped_storage())
        if count is not None:
            self._take(count)

    def _take(self, count: list[int]) -> None:
        self.now -= count[0]
        count[0] = 0
