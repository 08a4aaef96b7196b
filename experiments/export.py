"""Export a trained student for diffusers: its weights and a scheduler that samples exactly as we do.

LoRA students become ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of the base pipeline
reads; fully fine-tuned ones a ``unet/`` folder. ``scheduler/`` holds the run's sampler (``eval.sampler``), whose
timesteps are the student's own: an LCMScheduler's default of 50 original steps would give 999, 759, ... instead of
999, 749, 499, 249.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from core.backbones.base import STUDENT, STUDENT_EMA
from core.backbones.roles import Sharing
from core.backbones.unet import UNetBackbone
from core.config import UserError
from core.run import atomic_folder
from experiments.target import load_target

USAGE = """\
Few-step student exported by fewstep (run {run}).

    from diffusers import {scheduler}, {pipeline}{imports}

    pipe = {pipeline}.from_pretrained("{base}"{revision})
    {weights}
    pipe.scheduler = {scheduler}.from_pretrained("{out}", subfolder="scheduler")
    pipe("{prompt}", num_inference_steps={steps}, guidance_scale=1.0{eta}).images[0].save("image.png")

{note}No guidance: it is distilled into the student.
"""


def export(
    backbone: UNetBackbone,
    out: Path,
    weights: str = "student",
    steps: int = 4,
    run: str = "",
    sampler: str = "lcm",
    eta: float = 0.0,
) -> Path:
    """Write the role ``weights`` ("student" or "ema") and its sampler's scheduler to the folder ``out``.

    Raises: UserError: the run has no such weights, diffusers cannot express so many steps, or ``out`` cannot
    be written."""
    role = {"student": STUDENT, "ema": STUDENT_EMA}.get(weights)
    if role is None or role not in backbone.roles:
        raise UserError(f"weights={weights} cannot be exported from this run; allowed: student, ema (train.ema_decay)")
    scheduler = few_step_scheduler(backbone, steps, sampler)
    with atomic_folder(out) as folder:
        if backbone.roles.sharing.kind == "lora":
            state = lora_state(backbone.role_parameters(role), backbone.roles.sharing)
            StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
        else:
            with backbone.roles.use(role) as unet:
                unet.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")
        (folder / "README.md").write_text(_usage(backbone, out, steps, run, scheduler, eta))
    return out


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


def few_step_scheduler(backbone: UNetBackbone, steps: int, sampler: str = "lcm") -> LCMScheduler | DDIMScheduler:
    """The student's sampler: the teacher's noise schedule, timesteps of a ``steps``-step trailing grid."""
    total = backbone.process.num_train_timesteps
    if steps < 1 or total % steps:
        raise UserError(
            f"steps={steps} cannot be exported: diffusers' timesteps are equally spaced for divisors of {total}"
        )
    assert backbone.source is not None
    options = {"revision": backbone.revision} if backbone.revision else {}
    teacher = LCMScheduler.load_config(backbone.source, subfolder="scheduler", **options)
    common = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    if sampler == "ddim":
        return DDIMScheduler.from_config(teacher, set_alpha_to_one=True, **common)
    return LCMScheduler.from_config(teacher, original_inference_steps=steps, timestep_scaling=10.0, **common)


def run_command(arguments: Namespace) -> int:
    """``fewstep export RUN --out DIR``."""
    session, run = load_target(arguments.target, arguments.overrides, arguments.runs_dir)
    if not session.method.trains:
        raise UserError(f"run {run.id} is the teacher itself: nothing to export")
    steps = arguments.steps or max(session.config.eval.steps)
    how = session.config.eval
    out = export(session.backbone, Path(arguments.out), arguments.weights, steps, run.id, how.sampler, how.eta)
    print(out / "README.md")
    return 0


def _usage(
    backbone: UNetBackbone, out: Path, steps: int, run: str, scheduler: LCMScheduler | DDIMScheduler, eta: float
) -> str:
    lora = backbone.roles.sharing.kind == "lora"
    load = f'pipe.load_lora_weights("{out}")'
    copy = f'pipe.unet = UNet2DConditionModel.from_pretrained("{out}", subfolder="unet")'
    return USAGE.format(
        run=run,
        pipeline=backbone.pipeline,
        base=backbone.source,
        revision=f', revision="{backbone.revision}"' if backbone.revision else "",
        imports="" if lora else ", UNet2DConditionModel",
        weights=load if lora else copy,
        out=out,
        steps=steps,
        prompt="red apple",
        scheduler=type(scheduler).__name__,
        eta=f", eta={eta:g}" if eta else "",
        note=f"`num_inference_steps` must divide {steps}. " if isinstance(scheduler, LCMScheduler) else "",
    )
