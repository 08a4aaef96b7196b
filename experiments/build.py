"""Names to objects: the only file that knows which class a configuration's words stand for."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.allocator import keep_freed_memory
from core.backbones.base import STUDENT, Backbone
from core.backbones.flux2 import Flux2Backbone
from core.backbones.mmdit import SD3Backbone
from core.backbones.pipeline import PipelineBackbone
from core.backbones.pixart import PixArtBackbone
from core.backbones.roles import Sharing
from core.backbones.sdxl import SDXLBackbone
from core.backbones.tiny import (
    write_random_sd,
    write_tiny_flux2,
    write_tiny_flux2_dev,
    write_tiny_pixart,
    write_tiny_sd,
    write_tiny_sd3,
    write_tiny_sdxl,
)
from core.backbones.unet import UNetBackbone
from core.config import ExperimentConfig, TaskConfig, UserError
from core.data.batches import LatentData
from core.data.cache import LatentCache, build_cache, open_cache
from core.data.memory import Memory, Rows
from core.data.solutions import SolutionStore
from core.identity import identity_dict, locate, posed_problem, teacher_problem
from core.methods.base import Method
from core.methods.clock import Clock
from core.methods.dmd2 import Dmd2
from core.methods.flash import Flash
from core.methods.flash_dmd import FlashDmd
from core.methods.guidance import Guidance
from core.methods.lcm import Lcm
from core.methods.progressive import Progressive
from core.methods.teacher import Teacher
from core.rewards.base import Reward
from core.rewards.image import register_image_rewards
from core.rewards.known import KNOWN_REWARDS
from core.rewards.latent import load_latent_reward
from core.rewards.registry import register_reward
from core.tasks.base import Task
from core.tasks.text_to_image import TextToImage
from experiments.dataset import num_variants, open_split, shown_view, view_of
from experiments.needs import wrong_size
from experiments.parents import merged_before, merges_parent, parent_adapter, parent_weights, read_weights

FAMILIES: dict[str, type[PipelineBackbone]] = {
    "unet": UNetBackbone, "unet_sdxl": SDXLBackbone, "pixart": PixArtBackbone, "mmdit": SD3Backbone,
    "flux2": Flux2Backbone,
}  # fmt: skip
METHODS: dict[str, type[Method]] = {
    "flash": Flash, "dmd2": Dmd2, "flash_dmd": FlashDmd, "lcm": Lcm, "progressive": Progressive, "guidance": Guidance,
    "teacher": Teacher,
}  # fmt: skip
TASKS: dict[str, type[Task]] = {"text_to_image": TextToImage}
RANDOM_PIPELINES = {
    "tiny-sd": write_tiny_sd, "tiny-sdxl": write_tiny_sdxl, "tiny-pixart": write_tiny_pixart,
    "tiny-sd3": write_tiny_sd3, "tiny-flux2": write_tiny_flux2,
    "tiny-flux2-dev": write_tiny_flux2_dev, "sd-50m": write_random_sd,
}  # fmt: skip


def _emoji_reward(folder: Path, backbone: Backbone) -> Reward:
    from experiments.emoji.reward import EmojiReward  # open_clip is slow to import

    return EmojiReward(folder, backbone.device)


register_image_rewards()
register_reward(KNOWN_REWARDS["lrm"], load_latent_reward)
register_reward(KNOWN_REWARDS["emoji_clip"], _emoji_reward)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device_of(config: ExperimentConfig) -> torch.device:
    return device_named(config.execution.device)


def device_named(name: str) -> torch.device:
    """The device that ``execution.device`` names; UserError where it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("execution.device=cuda: no CUDA device is visible here; allowed: auto, cpu, cuda")
    return torch.device(name)


def build_task(config: ExperimentConfig) -> Task:
    """Build the task of the run, with the view of its data."""
    return TASKS[config.task.name](config.task, view_of(config), config.data.image_size)


def build_backbone(config: ExperimentConfig, *, to_be_sharded: bool = False) -> Backbone:
    """The teacher's pipeline with its roles still to be added; ``to_be_sharded`` as in ``PipelineBackbone.load``."""
    spec = config.backbone
    if device_of(config).type == "cpu":
        keep_freed_memory()
    if spec.family not in FAMILIES:
        raise UserError(f"backbone.family={spec.family} is unknown; allowed: {', '.join(FAMILIES)}")
    backbone = FAMILIES[spec.family].load(
        source_of(config),
        sharing_of(config),
        revision=spec.revision,
        device=device_of(config),
        dtype=storage_dtype(config),
        image_size=config.data.image_size,
        to_be_sharded=to_be_sharded,
        guidance_embedding=spec.guidance_embedding,
    )
    backbone.compute_dtype = compute_dtype(config)
    if merges_parent(config) and config.train.init_from is not None:
        backbone.merge_parent(parent_adapter(config))
    return backbone


def source_of(config: ExperimentConfig) -> str:
    """The pipeline's folder or hub id; a random pipeline is written to the cache first."""
    path = config.backbone.path
    if not path.startswith("random:"):
        return str(locate(path))
    name, root = path.removeprefix("random:"), Path(config.execution.cache_dir) / "random"
    if name not in RANDOM_PIPELINES:
        raise UserError(f"backbone.path={path} is unknown; allowed: {', '.join(RANDOM_PIPELINES)}")
    with _locked(root / f"{name}.lock"):
        return str(RANDOM_PIPELINES[name](root / name))


def sharing_of(config: ExperimentConfig) -> Sharing:
    """How the roles share one network."""
    spec = config.backbone
    targets = dict.fromkeys(
        [*spec.lora_targets, *(FAMILIES[spec.family].guidance_layers if spec.guidance_embedding else ())]
    )
    return Sharing(spec.sharing, spec.lora_rank, spec.lora_alpha, tuple(targets))


def compute_dtype(config: ExperimentConfig) -> torch.dtype | None:
    """The dtype of autocast; None: networks compute as they are stored."""
    return None if config.train.precision == "fp32" else DTYPES[config.train.precision]


def build_data(config: ExperimentConfig, backbone: Backbone) -> LatentData:
    """Latents and conditions, computed once for (weights, data, view, task) and memory-mapped from then on."""
    data, task = config.data, identity_dict(config.task)
    shown = [shown_view(config), num_variants(config), data.image_size]
    key = [config.backbone.weights_hash, data.data_hash, data.split, *shown]
    if task != identity_dict(TaskConfig()):  # caches older than tasks keep their names
        key.append(task)
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    folder = Path(config.execution.cache_dir) / "latents" / name
    with _locked(folder.with_suffix(".lock")):
        cache = _open_or_build(folder, config, backbone)
    return LatentData(cache, config.seed, device_of(config))


def _open_or_build(folder: Path, config: ExperimentConfig, backbone: Backbone) -> LatentCache:
    cache = open_cache(folder)
    if cache is not None:
        return cache
    dataset = open_split(config, config.data.split)
    _check_size(config, backbone)
    task = build_task(config)
    return build_cache(
        folder,
        dataset,
        task.item,
        num_variants(config),
        encode_image=lambda images: backbone.encode(images).cpu().numpy(),
        encode_text=lambda prompts: _arrays(backbone.encode_text(prompts).tensors),
        encode_inputs=lambda inputs: _arrays(task.encode_inputs(backbone, inputs)),
    )


def _check_size(config: ExperimentConfig, backbone: Backbone) -> None:
    """Encode one white picture: UserError unless its latent has the size that the network takes."""
    size = config.data.image_size
    latent = backbone.encode(np.full((1, size, size, 3), 255, dtype=np.uint8))
    if latent.shape[1:] != backbone.latent_shape:
        side = backbone.image_side
        raise UserError(wrong_size(config, f"it draws {side}x{side} pixels; give data.image_size={side}"))


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def build_clock(config: ExperimentConfig) -> Clock:
    return Clock(config.train.budget.amount, config.train.budget.unit, config.train.batch_size)


def build_method(
    config: ExperimentConfig,
    backbone: Backbone,
    data: LatentData | None = None,
    *,
    training: bool = True,
    lockstep: bool = False,
    memory: Memory | None = None,
) -> Method:
    """The method with its roles; ``data`` is needed to train with stored teacher solutions.

    Without ``training`` only with what sampling reads: the student, its average, a parent that teaches. ``lockstep``:
    the networks will be sharded over several processes. ``memory``: of what is trained in one process on one base.
    """
    method = METHODS[config.method.name](
        config.method,
        backbone,
        config.seed,
        ema_decay=config.train.ema_decay,
        solutions=None if data is None else _solutions(config, backbone, data, memory),
        memory=memory,
        training=training,
        lockstep=lockstep,
        initial=_initial(config),
    )
    if training:
        place_players(method, config)
    else:
        backbone.lay_out_for_sampling()
    return method


def _initial(config: ExperimentConfig) -> dict[str, Callable[[Backbone, str], None]]:
    """Functions that load the weights of roles which start from a file, by role."""
    if config.train.init_from is None or merges_parent(config):  # a new adapter on what the base holds
        return {}
    file = parent_weights(config)
    if merged_before(file) is not None:
        raise UserError(
            f"train.init_from={config.train.init_from} is a later round of a chain, whose student is an adapter on "
            "those of the rounds before; allowed: methods whose teacher is the parent"
        )
    return {STUDENT: partial(load_role, file=file)}


def storage_dtype(config: ExperimentConfig) -> torch.dtype:
    """Storage dtype at load. LoRA: the compute dtype (the base is frozen). Full copies: that of what trains."""
    if config.backbone.sharing == "lora":
        return DTYPES[config.train.precision]
    return torch.float32 if config.train.state_dtype == "fp32" else torch.bfloat16


def place_players(method: Method, config: ExperimentConfig) -> None:
    """Give what trains its dtype, and critics their device too; averages stay in fp32."""
    dtype = torch.float32 if config.train.state_dtype == "fp32" else torch.bfloat16
    placed: set[int] = set()
    for network in method.backbone.networks():
        placed.update(map(id, network.parameters()))
    for player in method.players():
        for parameter in player.parameters.values():
            device = parameter.device if id(parameter) in placed else method.backbone.device
            parameter.data = parameter.data.to(device, dtype)


def _solutions(config: ExperimentConfig, backbone: Backbone, data: LatentData, memory: Memory | None) -> Rows | None:
    """The solutions that runs share on disk, or those that trainings in this process share; None: neither."""
    problem = teacher_problem(config)
    if problem is None:
        posed = None if memory is None else posed_problem(config)
        return None if posed is None else memory.rows("solutions", json.dumps(posed, sort_keys=True))
    key = problem | {"data": data.content_hash}
    root = Path(config.execution.solutions_dir or Path(config.execution.cache_dir) / "solutions")
    return SolutionStore(root, key, key["samples"], backbone.latent_shape)


@torch.no_grad()
def load_role(backbone: Backbone, role: str, file: Path) -> None:
    """Overwrite a role's parameters with a snapshot's; UserError when they do not fit."""
    parameters = backbone.role_parameters(role)
    tensors = {**_of_guidance_layers(backbone, parameters), **read_weights(file)}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise UserError(f"{file}: not weights of this student (another backbone, sharing, or LoRA rank)")
    for name, parameter in parameters.items():
        parameter.data = tensors[name].to(parameter.device, parameter.dtype, copy=True)


def _of_guidance_layers(backbone: Backbone, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that a parent which took no guidance yet does not have: they stay as they are."""
    added = backbone.guidance_layers if backbone.has_guidance_layer else ()
    found = {}
    for name, parameter in parameters.items():
        if any(f"{layer}." in name for layer in added):
            found[name] = parameter.detach()
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time makes what others will read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"execution.cache_dir: {path.parent} cannot be written: {error.strerror}") from error
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
