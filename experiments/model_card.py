"""The card of an exported student: what it is, how to use it in diffusers, and what was measured of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.backbones.pipeline import PipelineBackbone
from core.catalogue import METRICS
from core.diffusion.process import FlowProcess
from core.run import Run
from core.sampler import Sampler
from core.splits import captions
from experiments.formats import LOADED_AS, Form
from experiments.sheet import newest_sheet

SHEET = "samples.png"
PROMPT = "red apple"

CARD = """\
---
library_name: diffusers
{base_model}tags: [text-to-image, few-step, {kind}]
---

# A student of {steps} steps

Distilled from {teacher} by fewstep{origin}. The weights are those of the {role}: {files}

```python
{code}
```

`student` is this folder, or where it lies on the hub.{note}

{measured}
The licence of the base model applies to this student too.
"""


@dataclass(frozen=True)
class Place:
    """The name of a folder, or a hub id and the branch there."""

    name: str
    revision: str | None = None

    @property
    def file_name(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Student:
    """An exported network and how it is sampled; ``weights``: student or ema.

    ``file`` holds it, a LoRA's file or the network's folder, and ``dtype`` is how it is stored.
    """

    backbone: PipelineBackbone
    sampler: Sampler
    weights: str
    scheduler: str
    form: Form
    file: str
    dtype: torch.dtype

    @property
    def is_lora(self) -> bool:
        return self.file.endswith(".safetensors")

    @property
    def guidance(self) -> float:
        """The guidance that diffusers' pipeline is told."""
        own = self.backbone.has_guidance_layer or self.sampler.guidance != 1
        return self.sampler.guidance if own else self.backbone.student_guidance

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that the sampler needs, and those of the backbone."""
        steps, eta = self.sampler.steps, self.sampler.eta
        options: dict[str, Any] = {"eta": eta} if eta else {}
        if isinstance(self.backbone.process, FlowProcess):
            options["sigmas"] = [round(1 - step / steps, 6) for step in range(steps)]
        return options | self.backbone.call_options()


def model_card(student: Student, place: Place, run: Run | None) -> str:
    """Markdown with a hub's front matter; ``place``: of the exported folder, ``run``: it was trained in, if known.

    No path of this machine is in it: a base model that is neither on the hub nor in this project is named alone.
    """
    path = str(student.backbone.source) if run is None else run.config.backbone.path
    on_hub = run is not None and run.config.backbone.weights_hash.startswith("hub:")
    return CARD.format(
        base_model=f"base_model: {path}\n" if on_hub else "",
        kind="lora" if student.is_lora else "full weights",
        steps=student.sampler.steps,
        teacher=_teacher(path, run, on_hub),
        origin="" if run is None else f" ({run.config.method.name}, run {run.id}, experiment {run.config.name})",
        role="student's average (EMA)" if student.weights == "ema" else "student itself, not of an average",
        files=_files(student),
        code="\n".join(_code(student, place, path, on_hub)),
        note=_note(student, run),
        measured="" if run is None else "\n".join(_measured(student, run)),
    )


def _files(student: Student) -> str:
    """Say which file holds the student, in which keys and in which dtype."""
    stored = f"stored in {str(student.dtype).removeprefix('torch.')}"
    if student.form.merge:
        return f"a whole pipeline, the base model's with the student in `{student.file}`, which is {stored}."
    if not student.is_lora:
        return f"a whole network in `{student.file}`, {stored}."
    keys = {
        "diffusers": "diffusers' keys",
        "kohya": "Kohya's keys, which kohya's scripts, ComfyUI and diffusers read",
        "comfyui": "keys that ComfyUI and diffusers read",
    }
    return f"a LoRA, `{student.file}`, {stored}, in {keys[student.form.keys]}."


def _code(student: Student, place: Place, path: str, on_hub: bool) -> Iterator[str]:
    """The lines that load the student into diffusers and draw a picture."""
    backbone, dtype = student.backbone, student.form.dtype
    loaded_as = f"torch.{LOADED_AS[dtype]}" if dtype else ""
    own = f', revision="{place.revision}"' if place.revision else ""
    argument = f", torch_dtype={loaded_as}" if dtype else ""
    yield from _imports(student, path)
    if student.form.merge:
        yield f'student = "{place.name}"'
        yield f"pipe = {backbone.pipeline}.from_pretrained(student{own}{argument})"
    else:
        yield f'base, student = {_base(path, on_hub)}, "{place.name}"'
        yield from _onto_the_base(student, own, argument)
    if dtype == "fp8":
        casting = f"torch.float8_e4m3fn, {loaded_as}, skip_modules_classes=(torch.nn.Conv2d,)"
        yield f"pipe.{backbone.network_folder}.enable_layerwise_casting({casting})"
    guidance = f"guidance_scale={student.guidance:g}"
    options = "".join(f", {key}={value}" for key, value in student.options.items())
    call = f'prompt="{PROMPT}", num_inference_steps={student.sampler.steps}, {guidance}{options}'
    yield f"image = pipe({call}).images[0]"
    yield 'image.save("image.png")'


def _imports(student: Student, path: str) -> Iterator[str]:
    """The imports that the lines of ``_code`` need, and an empty line."""
    names = [student.backbone.pipeline]
    if not student.form.merge:
        names.insert(0, student.scheduler)
        if _is_ours(path):
            yield "from core.config import locate  # of fewstep, which brings the base model"
        if not student.is_lora:
            names.append(student.backbone.network_class.__name__)
    if student.form.dtype:
        yield "import torch"
    yield f"from diffusers import {', '.join(names)}\n"


def _onto_the_base(student: Student, own: str, dtype: str) -> Iterator[str]:
    """The lines that load the base model and put student and sampler into it; ``own`` and ``dtype``: arguments."""
    backbone, folder = student.backbone, student.backbone.network_folder
    revision = f', revision="{backbone.revision}"' if backbone.revision else ""
    yield f"pipe = {backbone.pipeline}.from_pretrained(base{revision}{dtype})"
    if student.is_lora:
        file = f', weight_name="{student.file}"' if student.form.is_one_file else ""
        yield f"pipe.load_lora_weights(student{file}{own})"
    else:
        network = backbone.network_class.__name__
        yield f'pipe.{folder} = {network}.from_pretrained(student, subfolder="{folder}"{own}{dtype})'
    yield f'pipe.scheduler = {student.scheduler}.from_pretrained(student, subfolder="scheduler"{own})'


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


def _note(student: Student, run: Run | None) -> str:
    steps = student.sampler.steps
    divides = f" `num_inference_steps` must divide {steps}." if student.scheduler == "LCMScheduler" else ""
    if student.backbone.has_guidance_layer:
        method = None if run is None else run.config.method
        trained = "" if method is None else f", trained from {method.guidance_min:g} to {method.guidance_max:g}"
        return f" Guidance is an input of the student{trained}: it costs no second pass.{divides}"
    if student.sampler.guidance != 1:
        return f" Guidance takes a second pass, as of the base model.{divides}"
    return f" No guidance: it is distilled into the student.{divides}"


def _measured(student: Student, run: Run) -> Iterator[str]:
    """A table of the last values of these weights, each with the id of its protocol."""
    last: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in run.evals():
        if line["weights"] == student.weights:
            last[line["metric"], line["split"], line["steps"]] = line
    if last:
        yield "| metric | prompts | steps | NFE | value | images | protocol |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (metric, split, steps), line in sorted(last.items()):
        label = METRICS[metric].label if metric in METRICS else metric
        facts = (label, captions(split), steps, f"{line['nfe']:g}", f"{line['value']:.4g}", line["n"], line["protocol"])
        yield f"| {' | '.join(map(str, facts))} |"
    if newest_sheet(run.path) is not None:
        yield f"\n![Teacher and student on fixed prompts]({SHEET})"
