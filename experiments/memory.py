"""What a training holds in memory, before anything is rented: ``fewstep plan-memory EXPERIMENT --gpus N``.

Networks are built without numbers. Bytes of parameters, gradients, moments and averages follow from shapes; those of
activations from counting what lives during one micro-batch of every turn on fake tensors (torch's own MemTracker takes
neither frozen parameters nor a network that is called several times). Not counted: what the CUDA context and the
allocator take, and what judges decoded images (a critic, a perceptual loss) with the VAE's decoder that it needs.
"""

from __future__ import annotations

import copy
import math
import weakref
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from core.backbones.base import FAKE_SCORE, STUDENT, STUDENT_EMA, TEACHER, Cond
from core.backbones.pipeline import PipelineBackbone, read_json
from core.config import ExperimentConfig, UserError, compose
from core.critics.image import IMAGE_FEATURES
from core.data.batches import Batch
from core.identity import locate
from core.losses.perceptual import PERCEPTUAL_LOSSES
from core.methods.base import Method, total
from experiments.build import FAMILIES, METHODS, build_clock, compute_dtype, place_players, sharing_of, storage_dtype

FILE = Path(__file__).parent / "architectures.yaml"
GB = 1e9
ROLES = (TEACHER, STUDENT, STUDENT_EMA, FAKE_SCORE)


@dataclass(frozen=True)
class Row:
    """Bytes that one role needs for one purpose, on all devices together and on each."""

    role: str
    what: str
    all: int
    each: int


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """Published networks by hub id: ``network``, ``scheduler``, ``cond`` (sizes per sample)."""
    return yaml.safe_load(FILE.read_text())


def plan_memory(config: ExperimentConfig, num_devices: int) -> list[Row]:
    """Rows of a training by ``num_devices`` processes as ``config`` says; UserError for an unknown architecture."""
    method, _ = _build(config)
    sharded = config.execution.sharding == "fsdp" and num_devices > 1
    rows = list(_states(method, num_devices if sharded else 1, num_devices))
    if sharded:
        largest = max(_bytes(unit.parameters()) for unit in method.backbone.shard_units())
        rows.append(Row("all", "blocks gathered (this one and the next)", 2 * largest * num_devices, 2 * largest))
    for checkpointing in (False, True):
        name = "activations, checkpointed" if checkpointing else "activations, all kept"
        each = _activations(config, num_devices, checkpointing)
        rows.append(Row("all", name, each * num_devices, each))
    return rows


def _build(config: ExperimentConfig) -> tuple[Method, dict[str, list[int]]]:
    """The method on the meta device, and the sizes of what conditions its networks."""
    config = copy.deepcopy(config)
    if getattr(config.method, "gan", None) in IMAGE_FEATURES:
        config.method.gan = "off"
    if getattr(config.method, "distill_loss", None) in PERCEPTUAL_LOSSES:
        config.method.distill_loss = "mse"
    spec = config.backbone
    family = FAMILIES[spec.family]
    known = architectures().get(spec.path)
    folder = locate(spec.path)
    if known is None and not (folder / family.network_folder / "config.json").is_file():
        raise UserError(
            f"backbone.path={spec.path}: neither a folder with {family.network_folder}/config.json nor one of "
            + ", ".join(architectures())
        )
    if known is None:
        network = read_json(str(folder), f"{family.network_folder}/config.json", None)
        known = {
            "network": {key: value for key, value in network.items() if not key.startswith("_")},
            "scheduler": read_json(str(folder), "scheduler/scheduler_config.json", None),
            "cond": _cond_sizes(network),
        }
    with torch.device("meta"):
        backbone = family.from_architecture(known["network"], known["scheduler"], sharing_of(config))
        # Not `.to`: diffusers warns of modules that it keeps in fp32
        for parameter in backbone.roles.base.parameters():
            parameter.data = parameter.data.to(storage_dtype(config))
        backbone.compute_dtype = compute_dtype(config)
        method = METHODS[config.method.name](config.method, backbone, config.seed, ema=config.train.ema_decay > 0)
        backbone.device = torch.device("meta")
        place_players(method, config)
    return method, known["cond"]


class SolvedBefore:
    """In place of the store of teacher solutions: how many steps a solve takes depends on numbers, which fake tensors
    have not; it keeps no activations, so that its peak lies below that of any turn."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def fetch(self, positions: np.ndarray, compute: object) -> tuple[Tensor, bool]:
        return torch.zeros(len(positions), *self.shape), True


def _modules(method: Method) -> list[nn.Module]:
    """The networks, and what else a method has (critics)."""
    return [*method.backbone.networks(), *(value for value in vars(method).values() if isinstance(value, nn.Module))]


def _materialise(modules: Iterable[nn.Module]) -> None:
    """Fake tensors in place of those of the meta device; call it in a ``FakeTensorMode``."""
    for module in modules:
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    part._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cpu")


def _cond_sizes(network: dict[str, Any]) -> dict[str, list[int]]:
    """Of a pipeline folder, whose tokenizer is not read: CLIP's 77 tokens."""
    width = network.get("cross_attention_dim") or network["joint_attention_dim"]
    sizes = {"text": [77, width]}
    if pooled := network.get("pooled_projection_dim"):
        sizes["pooled"] = [pooled]
    return sizes


def _states(method: Method, parts: int, num_devices: int) -> Iterator[Row]:
    """Parameters of every role; gradients and moments of those that train."""
    in_parts: set[int] = set()  # parameters of the networks; critics are held whole
    for role in ROLES:
        if role not in method.backbone.roles:
            continue
        held = list(method.backbone.role_parameters(role).values())
        in_parts |= {id(parameter) for parameter in held}
        what = "parameters (fp32 average)" if role == STUDENT_EMA else "parameters"
        yield _row(role, what, held, [parts] * len(held), num_devices)
    for player in method.players():
        trained = list(player.parameters.values())
        cuts = [parts if id(parameter) in in_parts else 1 for parameter in trained]
        head = [parameter for parameter in trained if id(parameter) not in in_parts]
        if head:
            name = f"{player.name}: head" if player.name in ROLES else player.name
            yield _row(name, "parameters", head, [1] * len(head), num_devices)
        yield _row(player.name, "gradients", trained, cuts, num_devices)
        yield _row(player.name, "AdamW's two moments", trained * 2, cuts * 2, num_devices)


def _row(role: str, what: str, tensors: Sequence[Tensor], parts: Sequence[int], num_devices: int) -> Row:
    """Each device holds the n-th part of a tensor's first dimension, rounded up; all of it where n is 1."""
    whole = each = 0
    for tensor, cut in zip(tensors, parts, strict=True):
        size = tensor.numel() * tensor.element_size()
        whole += size * (num_devices if cut == 1 else 1)
        each += size // tensor.shape[0] * math.ceil(tensor.shape[0] / cut)
    return Row(role, what, whole, each)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _activations(config: ExperimentConfig, num_devices: int, checkpointing: bool) -> int:
    """Most bytes beside parameters, gradients and moments at any moment of an iteration with all turns, one device."""
    clock = build_clock(config)
    size = config.execution.micro_batch or max(config.train.batch_size // num_devices, 1)
    method, sizes = _build(config)
    method.solutions = SolvedBefore(method.backbone.latent_shape)
    if checkpointing:
        method.backbone.enable_activation_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(_modules(method))
        batch, held = _fake_batch(method.backbone, sizes, size), _modules(method)
        live = LiveBytes(tensor for module in held for tensor in (*module.parameters(), *module.buffers()))
        trained = {player.name: list(player.parameters.values()) for player in method.players()}
        for parameter in (p for one in trained.values() for p in one):
            parameter.register_post_accumulate_grad_hook(lambda p: live.forget(p.grad))  # has a row of its own
        with live:
            rollout = method.rollout(batch, clock)
            for name in method.turns(clock):
                loss = total(method.losses(name, rollout, clock), method.weights(name, clock))
                loss.backward(inputs=trained[name])
                del loss
                for parameter in trained[name]:
                    parameter.grad = None
    return live.peak


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


def _fake_batch(backbone: PipelineBackbone, sizes: dict[str, list[int]], size: int) -> Batch:
    cond = Cond({name: torch.zeros(size, *shape) for name, shape in sizes.items()})
    return Batch(np.arange(size), torch.zeros(size, *backbone.latent_shape), cond, cond[slice(0, 1)])


def run_command(arguments: Namespace) -> int:
    """``fewstep plan-memory EXPERIMENT [key=value ...] --gpus N``."""
    if arguments.gpus < 1:
        raise UserError(f"--gpus={arguments.gpus} is out of range; allowed: at least 1")
    config = compose(arguments.experiment, arguments.overrides)
    if not config.method.trains:
        raise UserError(f"{arguments.experiment} trains nothing: there is no memory to plan")
    print(_table(plan_memory(config, arguments.gpus), arguments.gpus, config))
    other = copy.deepcopy(config)
    other.backbone.sharing = "lora" if config.backbone.sharing == "full" else "full"
    theirs = planned_bytes(other, arguments.gpus)
    print(
        f"with backbone.sharing={other.backbone.sharing}: {theirs[0] / GB:,.1f} GB, {theirs[1] / GB:,.1f} GB a device"
    )
    return 0


def planned_bytes(config: ExperimentConfig, num_devices: int) -> tuple[int, int]:
    """What the plan adds up to: on all devices together, and on each."""
    return _sum(plan_memory(config, num_devices), config.execution.activation_checkpointing)


def _sum(rows: list[Row], checkpointing: bool) -> tuple[int, int]:
    """All rows, with one of the two kinds of activations."""
    unused = "activations, all kept" if checkpointing else "activations, checkpointed"
    kept = [row for row in rows if row.what != unused]
    return sum(row.all for row in kept), sum(row.each for row in kept)


def _table(rows: list[Row], num_devices: int, config: ExperimentConfig) -> str:
    lines = [f"{'':<14}{'':<42}{'all (GB)':>12}{f'each of {num_devices}':>12}"]
    lines += [f"{row.role:<14}{row.what:<42}{row.all / GB:>12,.2f}{row.each / GB:>12,.2f}" for row in rows]
    both = _sum(rows, config.execution.activation_checkpointing)
    how = "checkpointed" if config.execution.activation_checkpointing else "kept"
    lines.append(f"{'total':<14}{f'activations {how}':<42}{both[0] / GB:>12,.2f}{both[1] / GB:>12,.2f}")
    return "\n".join(lines)
