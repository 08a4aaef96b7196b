"""diffusers alone, from the exported files, gives our samples from the same injected noise."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    FlowMatchLCMScheduler,
    Flux2KleinPipeline,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file

from core.backbones.base import STUDENT
from core.backbones.flux2 import Flux2Backbone
from core.backbones.mmdit import SD3Backbone
from core.backbones.pipeline import PipelineBackbone
from core.backbones.roles import Sharing
from core.backbones.tiny import write_tiny_flux2, write_tiny_flux2_dev, write_tiny_sd, write_tiny_sd3
from core.backbones.unet import UNetBackbone
from core.config import UserError, compose, resolve
from core.diffusion.solvers import few_step_sample
from core.diffusion.timesteps import trailing_timesteps
from core.identity import locate
from core.run import Run
from core.sampler import FEW_STEP_SOLVERS, Sampler
from experiments.build import FAMILIES, build_backbone
from experiments.export import export, few_step_scheduler, lora_state
from experiments.formats import DEFAULT, LOADED_AS, Form
from tests import worlds

LORA = Sharing("lora", rank=4, alpha=2, targets=("to_q", "to_k", "to_v", "to_out.0"))
TWO_STEPS, FOUR_STEPS = Sampler("lcm", 2), Sampler("lcm", 4)
FORMS = {
    "lora": [DEFAULT, Form("kohya", dtype="fp16"), Form("comfyui", dtype="bf16"), Form(merge=True, dtype="fp8")],
    "full": [DEFAULT, Form(dtype="fp8"), Form(merge=True)],
}
EVERY_LAYER = Sharing("lora", rank=4, alpha=2, targets=tuple(compose("flash/emoji").backbone.lora_targets))
EMBEDDED = locate(compose("flash/emoji").backbone.path)  # v-prediction
PROMPTS = ["red apple", "blue heart", "a dog"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("teacher") / "tiny-sd")


def _student(teacher: Path, sharing: Sharing) -> UNetBackbone:
    """A student that is far from its teacher."""
    return _perturbed(UNetBackbone.load(str(teacher), sharing))


def _perturbed(backbone: PipelineBackbone, size: float = 0.3) -> PipelineBackbone:
    backbone.add_role(STUDENT, trainable=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.role_parameters(STUDENT).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return backbone


def _ours(
    backbone: UNetBackbone, noises: list[torch.Tensor], role: str = STUDENT, solver: str = "lcm", eta: float = 0.0
) -> torch.Tensor:
    cond = backbone.encode_text(PROMPTS)
    timesteps = trailing_timesteps(len(noises), 1000)
    with torch.no_grad():
        return few_step_sample(
            lambda x, t, rows: backbone.predict(role, x, t, cond[rows]),
            noises,
            timesteps,
            backbone.process,
            solver,
            eta,
        )


def _theirs(
    pipe: StableDiffusionPipeline, noises: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, eta: float = 0.0
) -> torch.Tensor:
    """The pipeline starts from the first noise; its scheduler is handed the others instead of drawing."""
    rest = iter([*noises[1:], torch.zeros_like(noises[0])])  # ddim draws in its last step too, times 0
    for module in ("scheduling_lcm", "scheduling_ddim"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: next(rest))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": len(noises), "guidance_scale": 1.0, "eta": eta, "output_type": "latent"}
    return pipe(PROMPTS, latents=noises[0], **options).images


def _noises(steps: int, channels: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((len(PROMPTS), channels, 8, 8), generator=generator) for _ in range(steps)]


def _check_lora(base: Path, sharing: Sharing, out: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _student(base, sharing)
    export(backbone, out, FOUR_STEPS)
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(out)
    pipe.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    noises = _noises(steps, backbone.latent_shape[0])
    ours = _ours(backbone, noises)
    theirs = _theirs(pipe, noises, monkeypatch)
    assert (ours - _ours(backbone, noises, "teacher")).abs().max() > 0.05, "the student must differ"
    assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sharing", [LORA, EVERY_LAYER], ids=["attention", "every layer"])
def test_exported_lora_gives_our_samples(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: Sharing, steps: int
) -> None:
    _check_lora(teacher, sharing, tmp_path / "out", steps, monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_exported_ddim_sampler_gives_our_samples(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eta: float
) -> None:
    backbone = _student(teacher, LORA)
    usage = (export(backbone, tmp_path / "out", Sampler("ddim", 4, eta=eta)) / "README.md").read_text()
    assert "DDIMScheduler" in usage and ("eta=0.5" in usage) == (eta == 0.5) and "must divide" not in usage
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    pipe.load_lora_weights(tmp_path / "out")
    pipe.scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    ours = _ours(backbone, _noises(4), solver="ddim", eta=eta)
    assert (ours - _ours(backbone, _noises(4))).abs().max() > 0.05, "another sampler than lcm"
    assert (ours - _theirs(pipe, _noises(4), monkeypatch, eta)).abs().max() < 1e-3


def test_exported_lora_of_the_embedded_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_lora(EMBEDDED, EVERY_LAYER, tmp_path / "out", 4, monkeypatch)


def test_exported_full_student_gives_our_samples(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = _student(teacher, Sharing("full"))
    export(backbone, tmp_path / "out", FOUR_STEPS)
    pipe = StableDiffusionPipeline.from_pretrained(
        teacher, unet=UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    )
    pipe.scheduler = LCMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert (_ours(backbone, _noises(4)) - _theirs(pipe, _noises(4), monkeypatch)).abs().max() < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_scheduler_has_the_students_timesteps(teacher: Path, steps: int) -> None:
    scheduler = few_step_scheduler(UNetBackbone.load(str(teacher), LORA), Sampler("lcm", max(4, steps)))
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), trailing_timesteps(steps, 1000))


@pytest.mark.parametrize("sharing", ["lora", "full"])
@pytest.mark.parametrize("family", [*worlds.WRITERS, "flux2 dev"])
def test_the_card_s_snippet_draws_our_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, sharing: str
) -> None:
    """As a user would paste it, beside the base model's and the student's folders."""
    write = worlds.WRITERS.get(family, write_tiny_flux2_dev)
    base, built = write(tmp_path / family), FAMILIES[family.split()[0]]
    settings = LORA if sharing == "lora" else Sharing("full")
    backbone = _perturbed(built.load(str(base), settings, image_size=64), 0.3 if sharing == "lora" else 0.02)
    for form in FORMS[sharing]:
        if _is_possible(form, family.split()[0], sharing):
            _check_snippet(backbone, tmp_path, monkeypatch, form=form)


def _is_possible(form: Form, family: str, sharing: str) -> bool:
    """Whether students take the form; test_formats says which."""
    try:
        form.check(family, sharing)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("experiment", ["flash/emoji", "dmd2/emoji_flux2"])
def test_the_card_s_snippet_works_on_the_embedded_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    config = resolve(compose(experiment, ["train.precision=fp32", f"execution.runs_dir={tmp_path}/runs"]))
    backbone = build_backbone(config)
    _check_snippet(_perturbed(backbone, 0.02), tmp_path, monkeypatch, Run.create(config))


def _check_snippet(
    backbone: PipelineBackbone,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run | None = None,
    form: Form = DEFAULT,
) -> None:
    out = export(backbone, folder / "out", TWO_STEPS, run=run, form=form)
    for file in out.rglob("*"):
        assert file.is_dir() or str(folder).encode() not in file.read_bytes(), f"a path of this machine: {file}"
    card = (out / "README.md").read_text()
    snippet = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    assert "\nimage = pipe(" in snippet
    exec(compile(_seeded(snippet), "README.md", "exec"), {"torch": torch})
    theirs = np.asarray(Image.open("image.png")).astype(int)
    if form.dtype:
        np.testing.assert_array_equal(theirs, _picture_as_stored(backbone, out, form, snippet))
        return
    ours = _picture(backbone, STUDENT)
    assert np.abs(ours - _picture(backbone, "teacher")).max() > 4, "the student must differ"
    assert theirs.shape == ours.shape and np.abs(theirs - ours).max() <= 1


def _seeded(code: str) -> str:
    return code.replace("image = pipe(", "torch.manual_seed(0)\nimage = pipe(")  # loading may draw numbers, too


def _picture_as_stored(backbone: PipelineBackbone, out: Path, form: Form, snippet: str) -> np.ndarray:
    """The snippet's picture, drawn in its dtype with our weights rounded to those of the files in ``out``."""
    stored = getattr(torch, LOADED_AS[form.dtype])
    pipe = getattr(diffusers, backbone.pipeline).from_pretrained(backbone.source, torch_dtype=stored)
    pipe.scheduler, network = few_step_scheduler(backbone, TWO_STEPS), getattr(pipe, backbone.network_folder)
    whole = list((out / backbone.network_folder).glob("*.safetensors"))
    if whole:
        network.load_state_dict(_rounded(backbone.roles.merged(STUDENT), load_file(*whole), form))
    else:
        lora = lora_state(backbone.role_parameters(STUDENT), backbone.roles.sharing)
        network.load_lora_adapter({name: value.to(stored) for name, value in lora.items()}, prefix=None)
    found = {"pipe": pipe, "torch": torch}
    exec(_seeded(next(line for line in snippet.splitlines() if line.startswith("image = "))), found)
    return np.asarray(found["image"]).astype(int)


def _rounded(network: torch.nn.Module, file: dict[str, torch.Tensor], form: Form) -> dict[str, torch.Tensor]:
    """Our weights rounded to the file's dtypes, which are checked: in 8 bits are most linear layers, and no others."""
    ours, loaded = network.state_dict(), getattr(torch, LOADED_AS[form.dtype])
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    small = {name for name, value in file.items() if value.dtype == torch.float8_e4m3fn}
    assert {name.rpartition(".")[0] for name in small} <= linear
    assert len(small) > len(linear) / 2 if form.dtype == "fp8" else not small
    assert {value.dtype for name, value in file.items() if name not in small} == {loaded}
    return {name: value.to(loaded).to(file[name].dtype).to(loaded) for name, value in ours.items()}


def _picture(backbone: PipelineBackbone, role: str) -> np.ndarray:
    """Our picture of the snippet's prompt, int (H, W, 3), from the noises that the pipeline draws one after another."""
    shape = backbone.latent_shape
    torch.manual_seed(0)
    noises = [torch.randn(1, *shape)]
    drawn = torch.randn(1, shape[1] * shape[2], shape[0]).mT.reshape(1, *shape)
    torch.manual_seed(0)
    torch.randn(1, *shape)
    noises.append(drawn if isinstance(backbone, Flux2Backbone) else torch.randn(1, *shape))
    cond, timesteps = backbone.encode_text(["red apple"]), backbone.process.timesteps(2)
    with torch.no_grad():
        latents = few_step_sample(
            lambda x, t, rows: backbone.predict(role, x, t, cond), noises, timesteps, backbone.process
        )
    return backbone.decode(latents)[0].astype(int)


def test_the_card_says_what_it_is_and_what_was_measured(teacher: Path, tmp_path: Path) -> None:
    """No path of this machine; a base model that is a folder is named by its content."""
    config = resolve(compose("flash/tiny", [f"execution.runs_dir={tmp_path}/runs", f"backbone.path={teacher}"]))
    run = Run.create(config)
    line = {"metric": "kd_effnet", "split": "train", "steps": 4, "nfe": 4, "n": 32, "protocol": "0011aabb"}
    run.append_eval({**line, "weights": "student", "value": 2.34567, "images": 16})
    run.append_eval({**line, "weights": "student", "value": 1.23456, "images": 32})
    run.append_eval({**line, "weights": "ema", "value": 9.9, "images": 32})
    (run.path / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(run.path / "samples" / "0000000032.png")
    out = export(_student(teacher, LORA), tmp_path / "out", FOUR_STEPS, run=run)
    text = (out / "README.md").read_text()
    assert f"(flash, run {run.id}, experiment flash/tiny)" in text and "student itself, not of an average" in text
    assert f"`tiny-sd` (a folder in diffusers' format, weights {config.backbone.weights_hash})" in text
    assert (
        "| Kernel distance | training captions | 4 | 4 | 1.235 | 32 | 0011aabb |" in text
        and "9.9" not in text
        and "2.346" not in text
    )
    assert "![Teacher and student on fixed prompts](samples.png)" in text and (out / "samples.png").exists()
    assert str(tmp_path) not in text and "{" not in text
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "diffusers", "tags": ["text-to-image", "few-step", "lora"]}


@pytest.mark.parametrize("family", ["sd3", "flux2"])
def test_exported_flow_students_give_our_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Also through a time shift that depends on the number of steps (FLUX.2)."""
    write, built, loaded = {
        "sd3": (write_tiny_sd3, SD3Backbone, StableDiffusion3Pipeline),
        "flux2": (write_tiny_flux2, Flux2Backbone, Flux2KleinPipeline),
    }[family]
    base = write(tmp_path / family)
    backbone = _perturbed(built.load(str(base), LORA, image_size=64))
    usage = (export(backbone, tmp_path / "out", FOUR_STEPS) / "README.md").read_text()
    assert "sigmas=[1.0, 0.75, 0.5, 0.25]" in usage and "FlowMatchLCMScheduler" in usage
    pipe = loaded.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "out")
    pipe.scheduler = FlowMatchLCMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(1, *backbone.latent_shape, generator=generator) for _ in range(4)]
    cond, timesteps = backbone.encode_text(PROMPTS[:1]), backbone.process.timesteps(4)
    tokens = [noise.flatten(2).mT if family == "flux2" else noise for noise in noises]
    rest = iter([*tokens[1:], torch.zeros_like(tokens[0])])
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", lambda *a, **k: next(rest))
    more = {"max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)} if family == "flux2" else {}
    theirs = pipe(
        prompt=PROMPTS[0], height=64, width=64, latents=noises[0], num_inference_steps=4, guidance_scale=1.0,
        sigmas=[1.0, 0.75, 0.5, 0.25], output_type="np", **more,
    ).images  # fmt: skip
    with torch.no_grad():
        ours, teacher = (
            backbone.pixels(
                few_step_sample(
                    lambda x, t, rows, role=role: backbone.predict(role, x, t, cond),
                    noises,
                    timesteps,
                    backbone.process,
                )
            )
            .permute(0, 2, 3, 1)
            .numpy()
            / 2
            + 0.5
            for role in (STUDENT, "teacher")
        )
    assert np.abs(ours - teacher).max() > 0.02, "the student must differ"
    assert np.abs(ours.clip(0, 1) - theirs).max() < 1e-3


def test_new_noise_of_a_flows_ddim_cannot_be_exported(tmp_path: Path) -> None:
    backbone = SD3Backbone.load(str(write_tiny_sd3(tmp_path / "sd3")), LORA)
    with pytest.raises(UserError, match="eval.eta=0.3 cannot be exported.*allowed: 0"):
        few_step_scheduler(backbone, Sampler("ddim", 4, eta=0.3))
    for solver in FEW_STEP_SOLVERS:
        with pytest.raises(UserError, match="steps=0 cannot be exported; allowed: at least 1"):
            few_step_scheduler(backbone, Sampler(solver, 0))


def test_missing_ema_is_one_clear_line(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights=ema cannot be exported from this run; allowed: student, ema"):
        export(_student(teacher, LORA), tmp_path / "out", FOUR_STEPS, weights="ema")
    assert not (tmp_path / "out").exists()
