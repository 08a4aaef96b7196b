"""The memory of a training, planned before anything is rented: ``fewstep plan-memory EXPERIMENT --gpus N``.

Bytes of parameters, gradients, moments and averages follow from shapes, those of activations from a fake iteration
(``experiments.fake_training``), those of gathered parts from what FSDP2 gathers. What is not counted is printed.
"""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.backbones.base import TEACHER
from core.config import ExperimentConfig, UserError, compose
from core.methods.base import Method, Role
from core.training.loop import micro_batch
from core.training.world import check_processes, is_sharded
from experiments.fake_training import Lived, build, frozen_beside, iteration

GB = 1e9


@dataclass(frozen=True)
class Row:
    """Bytes that one role needs for one purpose, on all devices together and on each."""

    role: str
    what: str
    all: int
    each: int


def plan_memory(config: ExperimentConfig, num_devices: int) -> list[Row]:
    """Rows of a training by ``num_devices`` processes as ``config`` says; UserError for an unknown architecture, and
    for what that many processes refuse to train."""
    check_processes(config, num_devices)
    micro_batches = config.train.batch_size // num_devices // micro_batch(config, num_devices)
    method = build(config)
    sharded = is_sharded(config.execution, num_devices)
    rows = list(_states(method, num_devices if sharded else 1, num_devices))
    found = {checkpointing: iteration(config, num_devices, checkpointing, sharded) for checkpointing in (False, True)}
    if not sharded:
        rows += _merged(method, num_devices)
    for name, network in frozen_beside(method).items():
        rows.append(_on_each(name, "parameters", _bytes(network.parameters(), None), num_devices))
    if sharded:
        rows += _gathered(method, found[True], micro_batches > 1, num_devices)
    elif num_devices > 1:
        turn = max(_bytes(player.parameters.values(), None) for player in method.players())
        rows.append(_on_each("all", "gradients of a turn, averaged at once", turn, num_devices))
    for checkpointing, name in ((False, "activations, all kept"), (True, "activations, checkpointed")):
        rows.append(_on_each("all", name, found[checkpointing].peak, num_devices))
    return rows


def _on_each(role: str, what: str, each: int, num_devices: int) -> Row:
    return Row(role, what, each * num_devices, each)


def _merged(method: Method, num_devices: int) -> Iterator[Row]:
    """Rows of the weights that hold an adapter, for forwards without its gradients; no forward of a training reads an
    average, but the sheets of its pictures do."""
    size = method.backbone.merged_bytes
    for role in method.roles():
        if size:
            yield _on_each(role.name, "weights with the adapter in them", size, num_devices)


def _gathered(method: Method, lived: Lived, accumulates: bool, num_devices: int) -> Iterator[Row]:
    """Rows of what FSDP2 holds whole for a while: parameters and gradients in the dtype that computes, sums in fp32.

    A block is gathered together with the next one and given back after use; parameters outside the blocks stay gathered
    as long as their network computes. Gradients of a block are copied to fp32 and averaged at once; where several
    micro-batches are accumulated they are kept whole in fp32 until the last one (``synchronise_gradients``).
    """
    dtype = method.backbone.compute_dtype
    reduced = dtype and torch.float32  # as in ``core.training.sharding``: without autocast what is stored
    blocks, outside = _gathered_parameters(method)
    largest = max(_bytes(block, dtype) for block in blocks)
    rest = max(_bytes(parameters, dtype) for parameters in outside)
    on_the_way = max(_gradient_bytes(block, dtype) + _gradient_bytes(block, reduced) for block in blocks)
    yield _on_each("all", "blocks gathered (this one and the next)", 2 * largest, num_devices)
    yield _on_each("all", "what is in no block, gathered", rest, num_devices)
    yield _on_each("all", "gradients of a block, to be averaged", on_the_way, num_devices)
    if accumulates:
        whole = max(_bytes(reached, reduced) for reached in lived.reached.values())
        yield _on_each("all", "gradients of a turn, while they accumulate", whole, num_devices)


def _gathered_parameters(method: Method) -> tuple[list[list[nn.Parameter]], list[list[nn.Parameter]]]:
    """Parameters of each block, and of each network outside its blocks; no forward of a training reads an average."""
    backbone, counted = method.backbone, set()
    for role in method.roles():
        if role.is_average:
            counted.update(map(id, backbone.role_parameters(role.name).values()))
    blocks = [_without(counted, unit) for unit in backbone.shard_units()]
    for block in blocks:
        counted.update(map(id, block))
    return blocks, [_without(counted, network) for network in backbone.networks()]


def _without(counted: set[int], module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if id(parameter) not in counted]


def _gradient_bytes(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> int:
    return _bytes((parameter for parameter in parameters if parameter.requires_grad), dtype)


def _states(method: Method, parts: int, num_devices: int) -> Iterator[Row]:
    """Parameters of every role; gradients and moments of those that train."""
    in_parts: set[int] = set()  # parameters of the networks; critics are held whole
    for role in (Role(TEACHER), *method.roles()):
        held = list(method.backbone.role_parameters(role.name).values())
        in_parts |= {id(parameter) for parameter in held}
        what = "parameters (fp32 average)" if role.is_average else "parameters"
        yield _row(role.name, what, held, [parts] * len(held), num_devices)
    for player in method.players():
        trained = list(player.parameters.values())
        cuts = [parts if id(parameter) in in_parts else 1 for parameter in trained]
        head = [parameter for parameter in trained if id(parameter) not in in_parts]
        if head:
            name = f"{player.name}: head" if player.role is not None else player.name
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


def _bytes(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> int:
    """Bytes of tensors in ``dtype``; None: as they are stored."""
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors)


def run_command(arguments: Namespace) -> int:
    """Print the plan, that of the other kind of sharing, and what both leave out."""
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
    print("\n".join(_notes(config)))
    return 0


def planned_bytes(config: ExperimentConfig, num_devices: int) -> tuple[int, int]:
    """Bytes of the whole plan: on all devices together, and on each."""
    return _sum(plan_memory(config, num_devices), config.execution.activation_checkpointing)


def _sum(rows: list[Row], checkpointing: bool) -> tuple[int, int]:
    """All rows, with one of the two kinds of activations."""
    unused = "activations, all kept" if checkpointing else "activations, checkpointed"
    kept = [row for row in rows if row.what != unused]
    return sum(row.all for row in kept), sum(row.each for row in kept)


def _notes(config: ExperimentConfig) -> Iterator[str]:
    """Notes on what the numbers leave out, or assume."""
    for file in config.method.weight_files:
        if file.stand_in and config.method.path_of(file) is None:
            yield f"method.{file.path} is not set: {file.stand_in}"
    yield (
        "not planned: CUDA's context, what its allocator and NCCL keep, and the text encoder, which is released before "
        "the training begins"
    )


def _table(rows: list[Row], num_devices: int, config: ExperimentConfig) -> str:
    lines = [f"{'':<18}{'':<42}{'all (GB)':>12}{f'each of {num_devices}':>12}"]
    lines += [f"{row.role:<18}{row.what:<42}{row.all / GB:>12,.2f}{row.each / GB:>12,.2f}" for row in rows]
    both = _sum(rows, config.execution.activation_checkpointing)
    how = "checkpointed" if config.execution.activation_checkpointing else "kept"
    lines.append(f"{'total':<18}{f'activations {how}':<42}{both[0] / GB:>12,.2f}{both[1] / GB:>12,.2f}")
    return "\n".join(lines)
