"""The card of an exported student: what it is, how to use it in diffusers, and what was measured of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.backbones.pipeline import PipelineBackbone
from core.catalogue import METRICS
from core.diffusion.process import FlowProcess
from core.run import Run
from core.sampler import Sampler
from experiments.sheet import newest_sheet

SHEET = "samples.png"

CARD = """\
---
library_name: diffusers
{base_model}tags: [text-to-image, few-step, {kind}]
---

# A student of {steps} steps

Distilled from {teacher} by fewstep{origin}. The weights are those of the {role}.

```python
{locate}from diffusers import {scheduler}, {pipeline}{imports}

base, student = {base}, "{student}"
pipe = {pipeline}.from_pretrained(base{revision})
{weights}
pipe.scheduler = {scheduler}.from_pretrained(student, subfolder="scheduler")
image = pipe(prompt="{prompt}", num_inference_steps={steps}, guidance_scale={guidance:g}{options}).images[0]
image.save("image.png")
```

`student` is this folder, or where it lies on the hub.{note}

{measured}
The licence of the base model applies to this student too.
"""


@dataclass(frozen=True)
class Student:
    """An exported network and how it is sampled; ``weights``: student or ema."""

    backbone: PipelineBackbone
    sampler: Sampler
    weights: str
    scheduler: str
    is_lora: bool

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that the sampler needs, and those of the backbone."""
        steps, eta = self.sampler.steps, self.sampler.eta
        options: dict[str, Any] = {"eta": eta} if eta else {}
        if isinstance(self.backbone.process, FlowProcess):
            options["sigmas"] = [round(1 - step / steps, 6) for step in range(steps)]
        return options | self.backbone.call_options()


def model_card(student: Student, name: str, run: Run | None) -> str:
    """Markdown with a hub's front matter; ``name``: of the exported folder, ``run``: it was trained in, if known.

    No path of this machine is in it: a base model that is neither on the hub nor in this project is named alone.
    """
    backbone = student.backbone
    network, folder = backbone.network_class.__name__, backbone.network_folder
    lora = "pipe.load_lora_weights(student)"
    copy = f'pipe.{folder} = {network}.from_pretrained(student, subfolder="{folder}")'
    path = str(backbone.source) if run is None else run.config.backbone.path
    on_hub = run is not None and run.config.backbone.weights_hash.startswith("hub:")
    return CARD.format(
        base_model=f"base_model: {path}\n" if on_hub else "",
        kind="lora" if student.is_lora else "full weights",
        teacher=_teacher(path, run, on_hub),
        origin="" if run is None else f" ({run.config.method.name}, run {run.id}, experiment {run.config.name})",
        role="student's average (EMA)" if student.weights == "ema" else "student itself, not of an average",
        scheduler=student.scheduler,
        pipeline=backbone.pipeline,
        imports="" if student.is_lora else f", {network}",
        locate="from core.config import locate  # of fewstep, which brings the base model\n" if _is_ours(path) else "",
        base=_base(path, on_hub),
        student=name,
        revision=f', revision="{backbone.revision}"' if backbone.revision else "",
        weights=lora if student.is_lora else copy,
        prompt="red apple",
        steps=student.sampler.steps,
        guidance=backbone.student_guidance,
        options="".join(f", {key}={value}" for key, value in student.options.items()),
        note=_note(student),
        measured="" if run is None else "\n".join(_measured(student, run)),
    )


def _base(path: str, on_hub: bool) -> str:
    """An expression for the base model's place."""
    if _is_ours(path):
        return f'locate("{path}")'
    return f'"{path}"' if on_hub else f'"{Path(path).name}"'


def _is_ours(path: str) -> bool:
    return path.startswith("package:")


def _teacher(path: str, run: Run | None, on_hub: bool) -> str:
    if on_hub:
        return f"[{path}](https://huggingface.co/{path})"
    content = "" if run is None else f", weights {run.config.backbone.weights_hash}"
    return f"`{Path(path).name}` (a folder in diffusers' format{content})"


def _note(student: Student) -> str:
    steps = student.sampler.steps
    divides = f" `num_inference_steps` must divide {steps}." if student.scheduler == "LCMScheduler" else ""
    return f" No guidance: it is distilled into the student.{divides}"


def _measured(student: Student, run: Run) -> Iterator[str]:
    """A table of the last values of these weights, each with the id of its protocol."""
    last: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in run.evals():
        if line["weights"] == student.weights:
            last[line["metric"], line["split"], line["steps"]] = line
    if last:
        yield "| metric | split | steps | NFE | value | images | protocol |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (metric, split, steps), line in sorted(last.items()):
        label = METRICS[metric].label if metric in METRICS else metric
        facts = (label, split, steps, f"{line['nfe']:g}", f"{line['value']:.4g}", line["n"], line["protocol"])
        yield f"| {' | '.join(map(str, facts))} |"
    if newest_sheet(run.path) is not None:
        yield f"\n![Teacher and student on fixed prompts]({SHEET})"
