"""Export a trained student for diffusers: its weights and a scheduler that samples exactly as we do.

LoRA students become ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of the base pipeline
reads; fully fine-tuned ones, and those of pipelines that read no LoRA, a ``unet/`` or ``transformer/`` folder. In
another form (``experiments/formats.py``) a LoRA is one file for other programs, or a whole pipeline is written.
``scheduler/`` holds the run's sampler (``eval.sampler``), whose timesteps are the student's own: an LCMScheduler's
default of 50 original steps would give 999, 759, ... instead of 999, 749, 499, 249. A flow's pipeline is told them as
``sigmas``.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from core.backbones.adapters import in_full, stacked
from core.backbones.base import STUDENT, STUDENT_EMA
from core.backbones.flux2 import Flux2Backbone
from core.backbones.pipeline import PipelineBackbone, dtype_of
from core.backbones.roles import Sharing
from core.backbones.unet import PREDICTIONS
from core.config import UserError
from core.diffusion.process import FlowProcess
from core.run import Run, atomic_folder
from core.sampler import Sampler
from experiments.build import FAMILIES
from experiments.formats import DEFAULT, LOADED_AS, Form, form_of
from experiments.kohya import kohya_state
from experiments.model_card import SHEET, Place, Student, model_card
from experiments.sheet import newest_sheet
from experiments.target import load_target, open_target

Scheduler = LCMScheduler | DDIMScheduler | FlowMatchLCMScheduler | FlowMatchEulerDiscreteScheduler


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
PREDICTION_TYPES = {kind: name for name, kind in PREDICTIONS.items()}
LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for


def export(
    backbone: PipelineBackbone,
    out: Path,
    sampler: Sampler,
    weights: str = "student",
    run: Run | None = None,
    form: Form = DEFAULT,
    place: Place | None = None,
) -> Path:
    """Write the role ``weights`` ("student" or "ema"), its sampler's scheduler and a model card to the folder ``out``.

    ``place``: where the card says that it lies; default: ``out``, named without the folders above it.

    Raises:
        UserError: the run has no such weights, diffusers cannot express so many steps or read the form back, or ``out``
            cannot be written.
    """
    role = {"student": STUDENT, "ema": STUDENT_EMA}.get(weights)
    if role is None or role not in backbone.roles:
        raise UserError(f"weights={weights} cannot be exported from this run; allowed: student, ema (train.ema_decay)")
    if backbone.has_guidance_layer and isinstance(backbone, Flux2Backbone):
        raise UserError(
            f"a student that takes guidance cannot be exported: {backbone.pipeline} tells its network of none"
        )
    form.check(family_of(backbone), "full" if backbone.has_guidance_layer else backbone.roles.sharing.kind)
    scheduler = few_step_scheduler(backbone, sampler, role)
    place = place or Place(out.name)
    with atomic_folder(out) as folder:
        if form.merge:
            file, dtype = _write_pipeline(backbone, role, scheduler, form, folder)
        elif _as_lora(backbone):
            file, dtype = _write_lora(backbone, role, form, folder, place.file_name)
        else:
            file, dtype = _write_network(backbone, role, form, folder)
        scheduler.save_pretrained(folder / "scheduler")
        student = Student(backbone, sampler, weights, type(scheduler).__name__, form, file, dtype)
        (folder / "README.md").write_text(model_card(student, place, run))
        sheet = None if run is None else newest_sheet(run.path)
        if sheet is not None:
            shutil.copy(sheet, folder / SHEET)
        _forget_paths(folder)
    return out


def _as_lora(backbone: PipelineBackbone) -> bool:
    """Whether diffusers' pipeline reads the student as a LoRA."""
    is_lora = backbone.roles.sharing.kind == "lora" and not backbone.has_guidance_layer  # none in the base's pipeline
    return is_lora and hasattr(getattr(diffusers, backbone.pipeline), "save_lora_weights")


def family_of(backbone: PipelineBackbone) -> str:
    """The backbone's name in the configuration."""
    return next(name for name, kind in FAMILIES.items() if type(backbone) is kind)


def _write_lora(backbone: PipelineBackbone, role: str, form: Form, folder: Path, name: str) -> tuple[str, torch.dtype]:
    """Write a LoRA; returns its file's name and its dtype."""
    file = f"{name}.safetensors" if form.is_one_file else LORA_FILE
    parameters, sharing = whole_adapter(backbone, role)
    dtype = DTYPES.get(form.dtype, next(iter(parameters.values())).dtype)
    if form.names_of(family_of(backbone)) == "kohya":
        state = kohya_state(backbone, parameters, sharing)
        about = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": sharing.rank,
            "ss_network_alpha": sharing.alpha,
        }
        save_file(_stored(state, dtype), folder / file, {"format": "pt"} | {key: str(about[key]) for key in about})
    else:
        state = _stored(lora_state(parameters, sharing), dtype)
        save = getattr(diffusers, backbone.pipeline).save_lora_weights
        save(folder, weight_name=file, **{f"{backbone.network_folder}_lora_layers": state})
    return file, dtype


def whole_adapter(backbone: PipelineBackbone, role: str) -> tuple[Mapping[str, Tensor], Sharing]:
    """Factors and size of all that makes the role of the base as it is published: also those of earlier rounds."""
    own, sharing = backbone.role_parameters(role), backbone.roles.sharing
    if not backbone.merged_parent:
        return own, sharing
    whole = stacked(backbone.merged_parent, in_full(own, sharing.alpha / sharing.rank))
    rank = max(len(value) for name, value in whole.items() if ".lora_A." in name)
    return whole, replace(sharing, rank=rank, alpha=rank)


def _stored(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value if name.endswith(".alpha") else value.to(dtype) for name, value in state.items()}


def _write_network(backbone: PipelineBackbone, role: str, form: Form, folder: Path) -> tuple[str, torch.dtype]:
    """Write the whole network; returns its folder's name and its dtype."""
    network, dtype = _whole_network(backbone, role, form.dtype)
    network.save_pretrained(folder / backbone.network_folder)
    return f"{backbone.network_folder}/", dtype


def _write_pipeline(
    backbone: PipelineBackbone, role: str, scheduler: Scheduler, form: Form, folder: Path
) -> tuple[str, torch.dtype]:
    """Write the base's pipeline with the student in it; its other parts are stored in what they are loaded as."""
    network, dtype = _whole_network(backbone, role, form.dtype)
    options = {"revision": backbone.revision} if backbone.revision else {}
    if form.dtype:
        options["torch_dtype"] = getattr(torch, LOADED_AS[form.dtype])
    load = getattr(diffusers, backbone.pipeline).from_pretrained
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)  # older versions know no other name
        pipeline = load(backbone.source, **{backbone.network_folder: network}, **options)
    pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return f"{backbone.network_folder}/", dtype


def _whole_network(backbone: PipelineBackbone, role: str, dtype: str | None) -> tuple[nn.Module, torch.dtype]:
    """The role's network without adapters, stored as ``dtype`` says."""
    network = backbone.roles.merged(role)
    if dtype is None:
        return network, dtype_of(network)
    if backbone.roles.sharing.kind == "full":
        network = copy.deepcopy(network)
    loaded_as = getattr(torch, LOADED_AS[dtype])
    network = nn.Module.to(network, loaded_as)  # diffusers' own warns of modules that it would load in fp32: of none
    if dtype == "fp8":  # what loading does, so that both compute the same
        network.enable_layerwise_casting(DTYPES["fp8"], loaded_as, skip_modules_classes=(nn.Conv2d,))
    return network, DTYPES[dtype]


def _forget_paths(folder: Path) -> None:
    """Take out of the configurations where on this machine their parts were loaded from."""
    for file in folder.rglob("*.json"):
        text = file.read_text()
        if 'name_or_path"' in text:
            content = json.loads(text)
            kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def lora_state(parameters: Mapping[str, Tensor], sharing: Sharing) -> dict[str, Tensor]:
    """LoRA factors under the names that diffusers reads.

    Our output is W + (alpha / rank) B A. Readers without metadata assume alpha = rank, so the factor is
    folded into B.
    """
    scale = sharing.alpha / sharing.rank
    return {
        name: (value.detach() * scale if ".lora_B." in name else value.detach()).cpu().contiguous()
        for name, value in parameters.items()
    }


def few_step_scheduler(backbone: PipelineBackbone, sampler: Sampler, role: str = STUDENT) -> Scheduler:
    """The student's sampler for diffusers: the teacher's noise schedule, timesteps of a trailing grid."""
    steps, solver, eta = sampler.steps, sampler.solver, sampler.eta
    if steps < 1:
        raise UserError(f"steps={steps} cannot be exported; allowed: at least 1")
    assert backbone.source is not None
    options = {"revision": backbone.revision} if backbone.revision else {}
    teacher = LCMScheduler.load_config(backbone.source, subfolder="scheduler", **options)
    kind = backbone.kind_of(role)
    if kind not in (("flow",) if isinstance(backbone.process, FlowProcess) else PREDICTION_TYPES):
        raise UserError(
            f"method.prediction={kind} cannot be exported: diffusers' samplers of this process read no such"
        )
    if isinstance(backbone.process, FlowProcess):
        if solver == "ddim" and eta > 0:
            raise UserError(
                f"eval.eta={eta:g} cannot be exported: diffusers' sampler of a flow adds no noise; allowed: 0"
            )
        # ddim without new noise is Euler's method
        return (FlowMatchLCMScheduler if solver == "lcm" else FlowMatchEulerDiscreteScheduler).from_config(teacher)
    total = backbone.process.num_train_timesteps
    if total % steps:
        raise UserError(
            f"steps={steps} cannot be exported: diffusers' timesteps are equally spaced for divisors of {total}"
        )
    common = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    common["prediction_type"] = PREDICTION_TYPES[kind]
    if solver == "ddim":
        return DDIMScheduler.from_config(teacher, set_alpha_to_one=True, **common)
    return LCMScheduler.from_config(teacher, original_inference_steps=steps, timestep_scaling=10.0, **common)


def run_command(arguments: Namespace) -> int:
    """``fewstep export RUN --out DIR``."""
    print(export_run(arguments, Path(arguments.out)) / "README.md")
    return 0


def export_run(arguments: Namespace, out: Path, place: Place | None = None) -> Path:
    """Export the run that the command line names to the folder ``out``."""
    run = open_target(arguments.target, arguments.overrides, arguments.runs_dir)
    session = load_target(run)
    settings = session.config.eval
    sampler = settings.sampler_at(arguments.steps or max(settings.steps))
    weights = arguments.weights or settings.weights
    return export(session.backbone, out, sampler, weights, run, form_of(arguments), place)
