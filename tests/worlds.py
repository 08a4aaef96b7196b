"""A tiny real world for tests: a random Stable-Diffusion-class pipeline, a few latents, and trainers on them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SamConfig,
    SamModel,
    ViTConfig,
    ViTModel,
)

from core.backbones.base import Backbone
from core.backbones.pipeline import PipelineBackbone
from core.backbones.roles import Sharing, keyed_init
from core.backbones.tiny import write_tiny_flux2, write_tiny_pixart, write_tiny_sd, write_tiny_sd3, write_tiny_sdxl
from core.config import ExperimentConfig, compose, resolve
from core.data.batches import LatentData
from core.data.cache import LatentCache
from core.data.solutions import SolutionStore
from core.methods.base import Rollout
from core.randomness import Stream
from core.run import Run
from core.training.loop import Trainer
from core.training.sharding import own_part, part_of, whole
from core.training.world import ALONE, World, is_sharded
from experiments.build import FAMILIES, METHODS, build_clock, place_players
from experiments.train import train_config

# Two iterations of a paper's experiment on a tiny pipeline
MINIATURE = [
    "data.image_size=64", "method.distill_loss=mse", "train.budget.amount=2", "train.batch_size=4",
    "train.precision=fp32", "backbone.lora_rank=4", "backbone.lora_alpha=4", "method.num_timesteps=8",
]  # fmt: skip
WRITERS: dict[str, Callable[[Path], Path]] = {
    "unet": write_tiny_sd, "unet_sdxl": write_tiny_sdxl, "pixart": write_tiny_pixart, "mmdit": write_tiny_sd3,
    "flux2": write_tiny_flux2,
}  # fmt: skip
LATENTS = {"flux2": (16, 4, 4)}
CONDS: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {"text": (16, 16)}, "unet_sdxl": {"text": (16, 40), "pooled": (12,)},
    "pixart": {"text": (12, 32), "mask": (12,)}, "mmdit": {"text": (20, 32), "pooled": (20,)},
    "flux2": {"text": (6, 48)},
}  # fmt: skip
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# SAM's image encoder, whose third layer sees all positions, and the smallest parts beside it
SMALL_SAM: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_dim": 32, "image_size": 64,
        "patch_size": 16, "window_size": 2, "global_attn_indexes": [2], "output_channels": 8,
    },
    "prompt_encoder_config": {"hidden_size": 8, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 8, "mlp_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 8,
    },
}  # fmt: skip
SMALL_VISION = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}


def copy_role(backbone: Backbone, source: str, target: str) -> None:
    """Give ``target`` the parameters of ``source``, in memory of its own."""
    theirs = backbone.role_parameters(source)
    for name, parameter in backbone.role_parameters(target).items():
        parameter.data = theirs[name].detach().to(parameter.dtype, copy=True)


def backbone(
    folder: Path,
    sharing: str = "lora",
    family: str = "unet",
    device: str = "cpu",
    *,
    targets: tuple[str, ...] = TARGETS,
    to_be_sharded: bool = False,
    guidance_embedding: int = 0,
) -> PipelineBackbone:
    layers = FAMILIES[family].guidance_layers if guidance_embedding else ()
    settings, options = Sharing(sharing, 4, 4, (*targets, *layers)), {"device": device, "to_be_sharded": to_be_sharded}
    options["guidance_embedding"] = guidance_embedding
    write = WRITERS[family]
    return FAMILIES[family].load(str(write(folder / f"tiny-{family}")), settings, image_size=64, **options)


def data(seed: int = 0, items: int = 24, family: str = "unet", device: str = "cpu") -> LatentData:
    """Noise for latents and conditioning, of the sizes that ``backbone`` has; every token counts."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((items, *LATENTS.get(family, (4, 8, 8)))).astype(np.float16)
    cond = {name: rng.standard_normal((5, *shape)).astype(np.float16) for name, shape in CONDS[family].items()}
    if "mask" in cond:
        cond["mask"] = np.ones_like(cond["mask"])
    captions, keys = [f"caption {i}" for i in range(5)], [f"item {i}" for i in range(items)]
    cache = LatentCache(latents, np.arange(items) % 5, captions, cond, keys, "synthetic")
    return LatentData(cache, seed, device)


def pictures(folder: Path, count: int = 8) -> Path:
    """A folder of one-coloured pictures with captions, as a user would bring it."""
    target = folder / "pictures"
    target.mkdir()
    for index in range(count):
        Image.new("RGB", (80, 64), (30 * index, 90, 120)).save(target / f"{index}.png")
        (target / f"{index}.txt").write_text(f"colour {index}")
    return target


def vision(folder: Path, kind: str) -> Path:
    """A random network of the kind dinov2, vit, clip or sam, as a folder of transformers."""
    with keyed_init(kind):
        model = {
            "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL_VISION, image_size=56, patch_size=14)),
            "vit": lambda: ViTModel(ViTConfig(**SMALL_VISION, image_size=32, patch_size=8)),
            "sam": lambda: _moved(SamModel(SamConfig(**SMALL_SAM))),
            "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL_VISION, image_size=32, patch_size=8)),
        }[kind]()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _moved(model: SamModel) -> SamModel:
    """Positions count: SAM's start at zero."""
    for name, parameter in model.vision_encoder.named_parameters():
        if "pos" in name:
            parameter.normal_()
    return model


def trained_on_pictures(folder: Path, experiment: str, *overrides: str) -> dict[str, Any]:
    """The last line of the log of a training, on ``pictures``, through the command's own code."""
    paths = [f"data.path={pictures(folder)}", f"execution.runs_dir={folder}/runs"]
    settings = resolve(compose(experiment, [*paths, *overrides]))
    assert train_config(settings) == 0
    return Run.create(settings).metrics()[-1]


def config(folder: Path, *overrides: str, sharing: str = "lora", experiment: str = "flash/tiny") -> ExperimentConfig:
    defaults = [f"execution.runs_dir={folder}/runs", f"backbone.sharing={sharing}", "execution.log_every_images=4"]
    method = compose(experiment, [*defaults, *overrides]).method
    fast = [f"method.{rate}=1e-3" for rate in ("student_lr", "critic_lr") if hasattr(method, rate)]
    out = compose(experiment, [*defaults, *fast, *overrides])
    out.backbone.weights_hash, out.data.data_hash = "tiny", "synthetic"
    return out


def trainer(
    folder: Path,
    overrides: Sequence[str] = (),
    sharing: str = "lora",
    solutions: SolutionStore | None = None,
    experiment: str = "flash/tiny",
    world: World = ALONE,
    family: str = "unet",
    device: str = "cpu",
) -> Trainer:
    """A trainer of a method on a tiny pipeline, resumed from its run folder when there is a state."""
    settings = config(folder, *overrides, sharing=sharing, experiment=experiment)
    with world.main_first():
        sharded = is_sharded(settings.execution, world.size)
        more = {"to_be_sharded": sharded, "guidance_embedding": settings.backbone.guidance_embedding}
        run, network = Run.create(settings), backbone(folder, sharing, family, device, **more)
    options = {"ema_decay": settings.train.ema_decay, "solutions": solutions, "lockstep": sharded}
    method = METHODS[settings.method.name](settings.method, network, settings.seed, **options)
    place_players(method, settings)
    attempt, latents = run.begin_attempt() if world.is_main else 0, data(settings.seed, family=family, device=device)
    return Trainer(settings, method, latents, run, build_clock(settings), attempt, world=world)


@torch.no_grad()
def move_apart(backbone: PipelineBackbone) -> None:
    """Roles that start as the teacher, sharded or not: alike, they would hide whose forward was computed."""
    for role in ("student", "fake_score"):
        for name, parameter in backbone.role_parameters(role).items():
            full = 0.05 * torch.from_numpy(Stream(0, role, name).normal([0], whole(parameter.detach()).shape)[0])
            own_part(parameter).add_(part_of(full, parameter))


def parameters(trained: Trainer) -> dict[str, Tensor]:
    """Everything that training may change, by player, cloned; averages by whom they follow."""
    found = {}
    for name, player in trained.players.items():
        for key, value in player.parameters.items():
            found[f"{name}/{key}"] = value.detach().clone()
    for role in trained.method.roles():
        if not role.trainable:
            for key, value in trained.method.backbone.role_parameters(role.name).items():
                found[f"{role.follows or role.name}/{role.name}/{key}"] = value.detach().clone()
    return found


def tensors(rollout: Rollout) -> dict[str, Tensor]:
    """The tensors of a rollout, by field."""
    found = {item.name: getattr(rollout, item.name) for item in dataclasses.fields(rollout)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def processes_of_their_own() -> BaseContext:
    """A process that has run a backward pass cannot be forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def together(folder: Path, work: Callable[[World], object], processes: int = 2) -> None:
    """Call ``work`` in as many gloo processes; a failure of one of them is the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    context = processes_of_their_own()
    pickled = cloudpickle.dumps(work)
    children = [context.Process(target=_join, args=(folder, pickled, rank, processes)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=300)
    left = [child.kill() for child in children if child.is_alive()]
    errors = "".join(file.read_text() for file in folder.glob("error-*"))
    assert not left and all(child.exitcode == 0 for child in children), errors or "the processes wait for one another"


def _join(folder: Path, pickled: bytes, rank: int, processes: int) -> None:
    try:
        work: Callable[[World], object] = cloudpickle.loads(pickled)
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=processes)
        work(World(rank, processes))
        if dist.is_initialized():  # a command of its own leaves by itself
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
