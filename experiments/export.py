"""Export a trained student for diffusers: its weights and a scheduler that samples exactly as we do.

LoRA students become ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of the base pipeline
reads; fully fine-tuned ones, and those of pipelines that read no LoRA, a ``unet/`` or ``transformer/`` folder.
``scheduler/`` holds the run's sampler (``eval.sampler``), whose timesteps are the student's own: an LCMScheduler's
default of 50 original steps would give 999, 759, ... instead of 999, 749, 499, 249. A flow's pipeline is told them as
``sigmas``.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import diffusers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler
from torch import Tensor

from core.backbones.base import STUDENT, STUDENT_EMA
from core.backbones.pipeline import PipelineBackbone
from core.backbones.roles import Sharing
from core.config import UserError
from core.diffusion.process import FlowProcess
from core.run import Run, atomic_folder
from core.sampler import Sampler
from experiments.model_card import SHEET, Student, model_card
from experiments.sheet import newest_sheet
from experiments.target import load_target, open_target

Scheduler = LCMScheduler | DDIMScheduler | FlowMatchLCMScheduler | FlowMatchEulerDiscreteScheduler


def export(
    backbone: PipelineBackbone,
    out: Path,
    sampler: Sampler,
    weights: str = "student",
    run: Run | None = None,
) -> Path:
    """Write the role ``weights`` ("student" or "ema"), its sampler's scheduler and a model card to the folder ``out``.

    Raises:
        UserError: the run has no such weights, diffusers cannot express so many steps, or ``out`` cannot be written.
    """
    role = {"student": STUDENT, "ema": STUDENT_EMA}.get(weights)
    if role is None or role not in backbone.roles:
        raise UserError(f"weights={weights} cannot be exported from this run; allowed: student, ema (train.ema_decay)")
    scheduler = few_step_scheduler(backbone, sampler)
    with atomic_folder(out) as folder:
        if _as_lora(backbone):
            state = lora_state(backbone.role_parameters(role), backbone.roles.sharing)
            save = getattr(diffusers, backbone.pipeline).save_lora_weights
            save(folder, **{f"{backbone.network_folder}_lora_layers": state})
        else:
            backbone.roles.merged(role).save_pretrained(folder / backbone.network_folder)
        scheduler.save_pretrained(folder / "scheduler")
        student = Student(backbone, sampler, weights, type(scheduler).__name__, _as_lora(backbone))
        (folder / "README.md").write_text(model_card(student, out.name, run))
        sheet = None if run is None else newest_sheet(run.path)
        if sheet is not None:
            shutil.copy(sheet, folder / SHEET)
    return out


def _as_lora(backbone: PipelineBackbone) -> bool:
    """Whether diffusers' pipeline reads the student as a LoRA."""
    return backbone.roles.sharing.kind == "lora" and hasattr(getattr(diffusers, backbone.pipeline), "save_lora_weights")


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


def few_step_scheduler(backbone: PipelineBackbone, sampler: Sampler) -> Scheduler:
    """The student's sampler for diffusers: the teacher's noise schedule, timesteps of a trailing grid."""
    steps, solver, eta = sampler.steps, sampler.solver, sampler.eta
    if steps < 1:
        raise UserError(f"steps={steps} cannot be exported; allowed: at least 1")
    assert backbone.source is not None
    options = {"revision": backbone.revision} if backbone.revision else {}
    teacher = LCMScheduler.load_config(backbone.source, subfolder="scheduler", **options)
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
    if solver == "ddim":
        return DDIMScheduler.from_config(teacher, set_alpha_to_one=True, **common)
    return LCMScheduler.from_config(teacher, original_inference_steps=steps, timestep_scaling=10.0, **common)


def run_command(arguments: Namespace) -> int:
    """``fewstep export RUN --out DIR``."""
    run = open_target(arguments.target, arguments.overrides, arguments.runs_dir)
    session = load_target(run)
    if not session.config.method.trains:
        raise UserError(f"run {run.id} is the teacher itself: nothing to export")
    steps = arguments.steps or max(session.config.eval.steps)
    sampler = session.config.eval.sampler_at(steps)
    weights = arguments.weights or session.config.eval.weights
    out = export(session.backbone, Path(arguments.out), sampler, weights, run)
    print(out / "README.md")
    return 0
