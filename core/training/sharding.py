"""Networks in parts: FSDP2 over the processes of a world, activation checkpointing.

A sharded parameter is a DTensor; each process updates its own part with plain arithmetic (``own_part``), so that
optimizers, averages and clipping are the same code with and without sharding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from core.backbones.base import Backbone
from core.config import ExecutionConfig
from core.training.world import World, is_sharded


def prepare(backbone: Backbone, execution: ExecutionConfig, world: World) -> None:
    """Checkpoint activations and shard as ``execution`` says; after the last role has been added.

    Roles are frozen or not by then, once and for all: FSDP2 reads that at its first forward.
    """
    if execution.activation_checkpointing:
        backbone.enable_activation_checkpointing()
    if is_sharded(execution, world.size):
        backbone.keep_adapters_apart()
        _shard(backbone, world)


def _shard(backbone: Backbone, world: World) -> None:
    device = "cuda" if world.on_cuda else "cpu"
    mesh = init_device_mesh(device, (world.size,))
    options = {"mesh": mesh}
    if backbone.compute_dtype is not None:  # parts are gathered in the dtype that computes; gradients meet in fp32
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=backbone.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for unit in backbone.shard_units():
        fully_shard(unit, **options)
    for network in backbone.networks():
        # torch's default keeps what lies outside of blocks gathered until a backward pass. An average has none: its
        # pictures and its snapshot would show what it was at its first forward, in the dtype that computes
        fully_shard(network, reshard_after_forward=True, **options)
        register_fsdp_forward_method(network, "half_forward")


def synchronise_gradients(backbone: Backbone, on: bool) -> None:
    """Whether the next backward pass averages sharded gradients over the processes; off while they accumulate."""
    for network in backbone.networks():
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(on)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; the tensor itself where nothing is sharded."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` (of this process) as the tensor that is sharded as ``whole`` is, sharing memory."""
    if not isinstance(whole, DTensor) or part.dim() != whole.dim():
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def part_of(full: Tensor, whole: Tensor) -> Tensor:
    """This process's part of ``full``, cut as ``whole`` is."""
    if not isinstance(whole, DTensor) or full.dim() != whole.dim():
        return full
    full = full.to(whole.device)
    return distribute_tensor(full, whole.device_mesh, whole.placements, src_data_rank=None).to_local()


def whole(tensor: Tensor) -> Tensor:
    """All parts together, in every process; a call of all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all parts of all gradients, the same in every process; scalar on the device."""
    sharded: list[Tensor] = []
    held: list[Tensor] = []  # by every process: counted once
    for parameter in parameters:
        if parameter.grad is not None:
            (sharded if isinstance(parameter, DTensor) else held).append(own_part(parameter.grad))
    device = (sharded or held)[0].device
    squares = torch.stack([_square(sharded, device), _square(held, device)])
    if sharded:
        parts = squares[0].clone()
        dist.all_reduce(parts)
        squares = torch.stack([parts, squares[1]])
    return squares.sum().sqrt()


def _square(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
