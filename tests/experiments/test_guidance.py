"""Guidance as an input of a real tiny network: zero at first, trained, sampled at any w, and the same in diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor

from core.backbones.base import PARENT, STUDENT, TEACHER
from core.config import ExperimentConfig, UserError, compose, resolve
from core.diffusion.guidance import fourier_features
from core.run import Run
from core.sampler import Sampler
from experiments.build import build_backbone, build_method
from experiments.export import export
from experiments.session import Session, load_run
from experiments.train import train_config
from tests import worlds

COMMON = [
    "train.budget.amount=16", "method.student_lr=3e-2", "execution.num_threads=1", "eval.prompts=red apple",
    "eval.metrics=[]", "execution.sample_every_images=1000",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guidance")
    worlds.pictures(folder)
    return folder


def configuration(home: Path, name: str, *overrides: str) -> ExperimentConfig:
    where = [f"execution.runs_dir={home}/runs", f"execution.cache_dir={home}/cache", f"data.path={home}/pictures"]
    return resolve(compose(name, [*COMMON, *where, *overrides]))


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request: pytest.FixtureRequest, home: Path) -> ExperimentConfig:
    config = configuration(home, "guidance/tiny", f"backbone.sharing={request.param}")
    assert train_config(config) == 0
    return config


def session_of(config: ExperimentConfig) -> Session:
    return load_run(Run.create(config).path)[0]


def inputs(session: Session) -> tuple[Tensor, Tensor, object]:
    x_t = torch.randn(2, *session.backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([999, 499]), session.backbone.encode_text(["red apple", "blue bird"])


def test_our_features_of_w_are_those_of_diffusers_pipelines() -> None:
    w = torch.tensor([1.0, 2.5, 13.0])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1, 256)
    torch.testing.assert_close(fourier_features(w, 256), theirs, rtol=1e-4, atol=2e-3)  # angles of thousands, in fp32


@pytest.mark.parametrize("words", ["guidance/sd15 backbone.lora_rank=4", "guidance/tiny",
                                   "guidance/tiny backbone=tiny_flux2"])  # fmt: skip
def test_a_student_begins_as_the_conditional_teacher_at_every_w(home: Path, words: str) -> None:
    """The public script for SDXL leaves its new layer random: guidance is noise in the time until it is unlearnt."""
    path = "random:tiny-flux2" if "flux2" in words else "random:tiny-sd"
    small = [f"backbone.path={path}", "data.image_size=64", "train.precision=fp32"]
    config = configuration(home, *words.split(), *small)
    backbone = build_backbone(config)
    session = Session(config, build_method(config, backbone, training=False), 0)
    x_t, t, cond = inputs(session)
    with torch.no_grad():
        teacher = backbone.predict(TEACHER, x_t, t, cond)
        for w in (1.0, 7.0):
            assert torch.equal(backbone.guided(STUDENT, x_t, t, cond, session.null, w), teacher)
            assert torch.equal(backbone.guided(TEACHER, x_t, t, cond, session.null, 1.0), teacher)
    layers = {key.partition(".lora_")[0] for key in backbone.role_parameters(STUDENT)}
    assert all(any(key.endswith(layer) for key in layers) for layer in backbone.guidance_layers)
    assert backbone.passes(7.0, STUDENT) == 1 and backbone.passes(7.0, TEACHER) == 2


def test_the_student_answers_to_w_in_one_pass_and_the_teacher_needs_two(trained: ExperimentConfig) -> None:
    session = session_of(trained)
    backbone = session.backbone
    x_t, t, cond = inputs(session)
    with torch.no_grad():
        low, high = (backbone.guided(STUDENT, x_t, t, cond, session.null, w) for w in (1.0, 8.0))
        assert (high - low).abs().max() > 1e-3
        assert dict(backbone.evaluations) == {STUDENT: 4}
        backbone.guided(TEACHER, x_t, t, cond, session.null, 8.0)
    assert backbone.evaluations[TEACHER] == 4


@pytest.mark.parametrize(
    ("solver", "pipeline", "scheduler"),
    [("ddim", StableDiffusionPipeline, DDIMScheduler), ("lcm", LatentConsistencyModelPipeline, LCMScheduler)],
)
def test_guidance_scale_works_in_diffusers(
    trained: ExperimentConfig, tmp_path: Path, solver: str, pipeline: type, scheduler: type
) -> None:
    """One step at two values of w, by the pipeline as it is loaded from the exported folder."""
    session = session_of(trained)
    backbone, null = session.backbone, session.null
    out = export(backbone, tmp_path / "out", Sampler(solver, 1, 4.0), run=Run.create(trained))
    unet = UNet.from_pretrained(out, subfolder="unet")
    assert unet.config.time_cond_proj_dim == 16 and unet.time_embedding.cond_proj.weight.abs().max() > 0
    pipe = pipeline.from_pretrained(backbone.source, unet=unet, safety_checker=None, requires_safety_checker=False)
    pipe.scheduler = scheduler.from_pretrained(out, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    noise, cond = torch.randn(1, 4, 8, 8), backbone.encode_text(["red apple"])
    found = []
    for w in (2.0, 7.0):
        ours = session.method.sample(STUDENT, [noise], cond, null, Sampler(solver, 1, w))
        options = {"num_inference_steps": 1, "guidance_scale": w, "output_type": "latent"}
        if solver == "lcm":
            options["original_inference_steps"] = 1
        theirs = pipe("red apple", latents=noise, **options).images
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        found.append(ours)
    assert (found[0] - found[1]).abs().max() > 3e-3
    card = (out / "README.md").read_text()
    assert "guidance_scale=4" in card and "trained from 1 to 8: it costs no second pass" in card


def test_steps_after_guidance_take_w_and_never_a_second_pass(trained: ExperimentConfig, home: Path) -> None:
    """A round from a guidance student: both take w in one pass, and at first they agree at each."""
    counts = ["method.teacher_steps=4", "method.student_steps=2", "method.teacher=parent", "eval.guidance=4"]
    inputs_of = ["backbone.guidance_embedding=16", f"backbone.sharing={trained.backbone.sharing}"]
    w_range = ["method.guidance_min=1", "method.guidance_max=8", f"train.init_from={Run.create(trained).id}"]
    config = configuration(home, "progressive/tiny", *counts, *inputs_of, *w_range)
    assert train_config(config) == 0
    session = session_of(config)
    backbone, teacher = session.backbone, session.method.teacher
    assert backbone.guidance_inputs == {STUDENT, "student_ema", teacher}
    parent, (x_t, t, cond) = session_of(trained), inputs(session)
    with torch.no_grad():
        theirs = backbone.guided(teacher, x_t, t, cond, session.null, 5.0)
        ours = parent.backbone.guided(STUDENT, x_t, t, cond, session.null, 5.0)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    last = Run.create(config).metrics()[-1]
    assert last["evaluations"][teacher] + last["stored_evaluations"] == 2 * 16, "two steps of one pass a sample"


def test_the_wrong_order_guides_a_parent_of_few_steps_by_two_passes(home: Path) -> None:
    """Steps first, without guidance; then the guidance of that student, on its own grid alone."""
    steps = configuration(home, "progressive/tiny", "method.guidance_min=1", "method.guidance_max=1",
                          "method.null_prob=0.5", "backbone.sharing=full")  # fmt: skip
    assert train_config(steps) == 0
    words = ["method.teacher=parent", "method.num_timesteps=4", f"train.init_from={Run.create(steps).id}"]
    config = configuration(home, "guidance/tiny", "backbone.sharing=full", *words)
    backbone = build_backbone(config)
    method = build_method(config, backbone, training=False)
    assert method.teacher == PARENT and backbone.guidance_inputs == {STUDENT, "student_ema"}
    assert [backbone.passes(4.0, role) for role in (STUDENT, PARENT)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "override", "line"),
    [
        ("flash/tiny", "backbone.guidance_embedding=16", "16 is not for method=flash; allowed: 0"),
        ("guidance/tiny", "backbone.guidance_embedding=0", "0 leaves method=guidance without an input"),
        ("guidance/tiny", "backbone.guidance_embedding=3", "3 is out of range; allowed: 0, and even numbers"),
    ],
)  # fmt: skip
def test_who_takes_guidance_is_settled_before_anything_is_built(name: str, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        compose(name, [override])
    assert str(error.value).startswith(f"backbone.guidance_embedding={line}") and "\n" not in str(error.value)


def test_a_network_that_its_pipeline_tells_of_no_guidance_is_not_exported(home: Path, tmp_path: Path) -> None:
    config = configuration(home, "guidance/tiny", "backbone=tiny_flux2")
    backbone = build_backbone(config)
    build_method(config, backbone, training=False)
    with pytest.raises(UserError, match="cannot be exported: Flux2KleinPipeline tells its network of none"):
        export(backbone, tmp_path / "out", Sampler("ddim", 4))


def test_a_family_without_such_an_input_is_one_line(home: Path) -> None:
    config = configuration(home, "guidance/tiny", "backbone=tiny_sd3", "backbone.guidance_embedding=16")
    with pytest.raises(UserError, match=r"guidance_embedding=16: there is no such input for this family; allowed: 0"):
        build_backbone(config)
