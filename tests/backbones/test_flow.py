"""SD3 and FLUX.2 against diffusers' own pipelines, and their published sizes."""

import math
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from core.backbones.base import TEACHER
from core.backbones.flux2 import Flux2Backbone
from core.backbones.mmdit import SD3Backbone
from core.backbones.pipeline import PipelineBackbone
from core.backbones.roles import Sharing
from core.backbones.tiny import write_tiny_flux2, write_tiny_flux2_dev, write_tiny_sd3, write_tiny_sdxl
from core.config import UserError, compose
from core.data.requests import Requests
from core.methods.dmd2 import Dmd2
from core.methods.teacher import Teacher, teacher_sample
from core.sampler import Sampler, Setting, teacher_setting
from experiments.fake_training import architectures
from experiments.session import Session
from tests import worlds

PROMPTS = ["red apple", ""]
SHARING = Sharing("lora", 4, 4, ("to_q", "to_k", "to_v"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pipelines")
    written = {"flux2": write_tiny_flux2, "dev": write_tiny_flux2_dev, "sd3": write_tiny_sd3}
    return {name: str(write(root / name)) for name, write in written.items()}


def load(folders: dict[str, str], family: str) -> tuple[PipelineBackbone, Any]:
    ours, theirs = {
        "flux2": (Flux2Backbone, Flux2KleinPipeline), "dev": (Flux2Backbone, Flux2Pipeline),
        "sd3": (SD3Backbone, StableDiffusion3Pipeline),
    }[family]  # fmt: skip
    pipe = theirs.from_pretrained(folders[family])
    pipe.set_progress_bar_config(disable=True)
    return ours.load(folders[family], SHARING, image_size=64), pipe


@pytest.mark.parametrize(
    ("built", "name", "parameters"),
    [
        (SD3Backbone, "stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000),
        (Flux2Backbone, "black-forest-labs/FLUX.2-klein-base-4B", 3_875_544_576),
        (Flux2Backbone, "black-forest-labs/FLUX.2-dev", 32_223_281_152),
    ],
    ids=["sd3-medium", "flux2-klein", "flux2-dev"],
)
def test_the_published_networks_build_without_weights(built: Any, name: str, parameters: int) -> None:
    """About 2.0, 3.9 and 32 billion parameters."""
    published = architectures()[name]
    with torch.device("meta"):
        backbone = built.from_architecture(published["network"], published["scheduler"], SHARING)
        backbone.add_role("student", trainable=True)
    assert sum(p.numel() for p in backbone.role_parameters(TEACHER).values()) == parameters
    assert backbone.latent_shape[1:] == {SD3Backbone: (128, 128), Flux2Backbone: (64, 64)}[built]  # 1024 pixels


def test_prompts_are_encoded_as_diffusers_does(folders: dict[str, str]) -> None:
    backbone, pipe = load(folders, "sd3")
    text, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS[0], None, None, device="cpu")
    ours = backbone.encode_text(PROMPTS)
    torch.testing.assert_close(ours.tensors["text"], torch.cat([text, null]))
    torch.testing.assert_close(ours.tensors["pooled"], torch.cat([pooled, null_pooled]))
    for family, length in (("flux2", 32), ("dev", 512)):
        backbone, pipe = load(folders, family)
        options = {"max_sequence_length": length, "text_encoder_out_layers": (1, 2, 3)}
        theirs = pipe.encode_prompt(PROMPTS, device="cpu", **options)[0]
        torch.testing.assert_close(backbone.encode_text(PROMPTS).tensors["text"], theirs)
        assert theirs.shape == (2, length, 48) and (theirs[0] - theirs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd3", "flux2", "dev"])
def test_guided_pictures_are_those_of_diffusers(folders: dict[str, str], family: str) -> None:
    """Euler's method from one noise, to pixels: time shift, guidance, packing, VAE statistics."""
    backbone, pipe = load(folders, family)
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, null = backbone.encode_text(PROMPTS[:1]), backbone.encode_text([""])
    ours = teacher_sample(backbone, noise, cond, null, Sampler("ddim", 4, 3.0))
    options = {"sigmas": np.linspace(1, 0.25, 4), "latents": noise}
    if family != "sd3":
        options |= {"max_sequence_length": {"flux2": 32, "dev": 512}[family], "text_encoder_out_layers": (1, 2, 3)}
    theirs = pipe(
        prompt=PROMPTS[0], height=64, width=64, num_inference_steps=4, guidance_scale=3.0, output_type="np", **options
    ).images
    difference = np.abs(backbone.decode(ours).astype(float) - theirs * 255).max()
    assert difference <= 1, difference
    assert theirs.std() > 0.01


@pytest.mark.parametrize("family", ["sd3", "flux2"])
def test_latents_are_encoded_to_what_decodes(folders: dict[str, str], family: str) -> None:
    backbone, _ = load(folders, family)
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(backbone._from_vae(backbone._to_vae(latents)), latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "flux2"])
def test_features_are_what_half_of_the_blocks_hand_on(folders: dict[str, str], family: str) -> None:
    """The explicit half forward equals the hidden states caught in a whole one."""
    backbone, _ = load(folders, family)
    x_t = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([900.0, 300.0]), backbone.encode_text(PROMPTS)
    caught: list[torch.Tensor] = []
    middle = backbone.roles.base.transformer_blocks[1]  # of four in all
    handle = middle.register_forward_hook(lambda module, given, out: caught.append(out[1]))
    backbone.predict(TEACHER, x_t, t, cond)
    handle.remove()
    found = backbone.features(TEACHER, x_t, t, cond)
    assert found.shape[1:] == backbone.feature_shape
    torch.testing.assert_close(found.flatten(2).mT, caught[0])


def test_a_guidance_distilled_network_takes_guidance_in_one_pass(tmp_path: Path) -> None:
    folder = write_tiny_flux2_dev(tmp_path / "dev")
    backbone = Flux2Backbone.load(str(folder), SHARING, image_size=64)
    x_t, t = torch.randn(2, *backbone.latent_shape), torch.tensor([900.0, 300.0])
    cond, null = backbone.encode_text(PROMPTS), backbone.encode_text([""])
    found = {w: backbone.guided(TEACHER, x_t, t, cond, null, w) for w in (1.0, 4.0)}
    assert backbone.evaluations[TEACHER] == 4, "no null pass"
    torch.testing.assert_close(found[4.0], backbone.predict(TEACHER, x_t, t, cond))
    assert (found[1.0] - found[4.0]).abs().max() > 1e-4
    each = backbone.guided(TEACHER, x_t, t, cond, null, torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(each, torch.stack([found[1.0][0], found[4.0][1]]))
    assert [backbone.passes(w) for w in (1.0, 4.0, torch.ones(2))] == [1, 1, 1]


def test_a_student_whose_guidance_is_an_input_is_sampled_as_it_trains(tmp_path: Path) -> None:
    """One step of its sampler is the x0 that its losses see; 4 steps cost 4 evaluations, also of its teacher."""
    config = compose("dmd2/tiny", ["backbone=tiny_flux2", "method.num_steps=1"])
    folder = write_tiny_flux2_dev(tmp_path / "dev")
    backbone = Flux2Backbone.load(str(folder), SHARING, image_size=64)
    method = Dmd2(config.method, backbone, config.seed)
    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, null = backbone.encode_text(PROMPTS), backbone.encode_text([""])
    t = torch.full((2,), float(backbone.process.timesteps(1)[0]))
    trained = method.student_x0(noise, t, cond)
    sampled = method.sample("student", [noise], cond, null, Sampler("lcm", 1))
    torch.testing.assert_close(sampled, trained.detach())
    other = method.sample("student", [noise], cond, null, Sampler("lcm", 1, guidance=2.0))
    assert (other - sampled).abs().max() > 1e-3
    session = Session(config, method, 0)
    settings = Setting("student", Sampler("lcm", 4)), teacher_setting(20, 4.0)
    assert [session.sample(Requests(tuple(PROMPTS)), setting).cost.nfe for setting in settings] == [4, 20]


def test_guided_steps_cost_two_evaluations(folders: dict[str, str]) -> None:
    config = compose("teacher/tiny", ["backbone=tiny_flux2"])
    backbone = load(folders, "flux2")[0]
    session = Session(config, Teacher(config.method, backbone, config.seed), 0)
    costs = []
    for steps, guidance in [(4, 1.0), (4, 3.0), (5, 3.0), (10, 7.5)]:
        drawn = session.sample(Requests(tuple(PROMPTS)), Setting("teacher", Sampler("ddim", steps, guidance)))
        costs.append(drawn.cost.nfe)
    assert costs == [4, 8, 10, 20]
    assert not backbone.evaluations, "pictures are no part of a training's count"


def test_a_network_in_bf16_is_told_the_time_in_full(folders: dict[str, str]) -> None:
    backbone = SD3Backbone.load(folders["sd3"], SHARING, dtype=torch.bfloat16)
    told = []
    backbone.roles.base.time_text_embed.register_forward_pre_hook(lambda module, given: told.append(given[0]))
    t = torch.tensor([750.0, 331.7])  # bf16 would make 752 and 332 of them
    x_t, cond = torch.randn(2, *backbone.latent_shape), backbone.encode_text(PROMPTS)
    backbone.predict(TEACHER, x_t, t, cond)
    backbone.features(TEACHER, x_t, t, cond)
    assert [found.tolist() for found in told] == [t.tolist()] * 2


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux2"])
@pytest.mark.parametrize("experiment", ["dmd2/tiny", "flash/tiny"])
def test_the_tiny_twins_train_through_the_same_code(tmp_path: Path, family: str, experiment: str) -> None:
    short = ["data.view=plain", "data.split=train", "train.budget.amount=2", "train.budget.unit=iterations"]
    last = worlds.trained_on_pictures(tmp_path, experiment, f"backbone={family}", *short)
    assert last["images"] == 8 and all(math.isfinite(value) for key, value in last.items() if "/" in key)


@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_a_guidance_distilled_network_is_distilled_without_null_passes(tmp_path: Path, sharing: str) -> None:
    """FLUX.2 dev's class of network: DMD2 asks the teacher once for each of 4 samples in 2 iterations."""
    folder = write_tiny_flux2_dev(tmp_path / "dev")
    data = ["data.view=plain", "data.split=train", "train.budget.amount=2", "train.budget.unit=iterations"]
    options = ["backbone=tiny_flux2", f"backbone.path={folder}", f"backbone.sharing={sharing}", "method.ttur=1"]
    last = worlds.trained_on_pictures(tmp_path, "dmd2/tiny", *options, *data)
    losses = {key: value for key, value in last.items() if "/" in key}
    assert last["images"] == 8 and all(math.isfinite(value) for value in losses.values())
    assert losses["student/grad_norm"] > 0 and losses["fake_score/grad_norm"] > 0
    assert last["evaluations"]["teacher"] == 8


@pytest.mark.parametrize(
    ("experiment", "write"),
    [
        ("dmd2/flux2_dev", write_tiny_flux2_dev),
        ("dmd2/flux2_dev_4", write_tiny_flux2_dev),
        ("dmd2/flux2_klein", write_tiny_flux2),
        ("dmd2/flux2_klein_4", write_tiny_flux2),
        ("dmd2/sdxl", write_tiny_sdxl),
        ("flash/sd3", write_tiny_sd3),
    ],
)
def test_the_experiments_of_paper_scale_train_tiny_twins(
    tmp_path: Path, experiment: str, write: Callable[[Path], Path]
) -> None:
    """As they are written: precision, states, critics, sharing, micro-batches; only sizes and budget are smaller."""
    small = ["data.image_size=64", "train.budget.amount=2", "train.budget.unit=iterations", "train.batch_size=4"]
    paths = [f"backbone.path={write(tmp_path / 'twin')}"]
    of_dmd2 = compose(experiment).method.name == "dmd2"
    dino = worlds.vision(tmp_path / "dino", "dinov2")
    paths += [f"method.dino_path={dino}", "method.ttur=1"] if of_dmd2 else ["method.distill_loss=mse"]
    last = worlds.trained_on_pictures(tmp_path, experiment, *paths, *small)
    assert last["images"] == 8 and all(math.isfinite(value) for key, value in last.items() if "/" in key)
    assert last["student/grad_norm"] > 0


def test_the_time_shift_of_flux2_is_that_of_its_pipeline(folders: dict[str, str]) -> None:
    backbone, pipe = load(folders, "flux2")
    for steps in (4, 8, 20):
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(16, steps))
        assert backbone.process.timesteps(steps) == pytest.approx(pipe.scheduler.timesteps.numpy(), rel=1e-5)


def test_a_text_encoder_stored_in_bf16_stays_so(folders: dict[str, str], tmp_path: Path) -> None:
    """As the released ones of FLUX.2 are; what it says is fp32 for everybody."""
    whole = load(folders, "flux2")[0]
    half = Flux2Backbone.load(str(copytree(folders["flux2"], tmp_path / "bf16")), SHARING, image_size=64)
    whole.text_encoder.to(torch.bfloat16).save_pretrained(tmp_path / "bf16" / "text_encoder")
    whole.release_text_encoders()
    assert whole.text_encoder.dtype == torch.float32 and half.text_encoder.dtype == torch.bfloat16
    found, expected = (backbone.encode_text(PROMPTS).tensors["text"] for backbone in (half, whole))
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("backbone", ["tiny_sd3", "tiny_flux2"])
def test_missing_parts_are_told_in_one_line(folders: dict[str, str], tmp_path: Path, backbone: str) -> None:
    assert compose("dmd2/tiny", [f"backbone={backbone}"]).backbone.path.startswith("random:")
    built = {"tiny_sd3": SD3Backbone, "tiny_flux2": Flux2Backbone}[backbone]
    with pytest.raises(UserError, match=f"no {built.pipeline} can be read there \\(needs transformer/, vae/"):
        built.load(str(tmp_path), SHARING)
    copy = copytree(folders[backbone.removeprefix("tiny_")], tmp_path / "copy")
    rmtree(copy / "text_encoder")
    with pytest.raises(UserError, match="copy/text_encoder: cannot be loaded"):
        built.load(str(copy), SHARING, image_size=64).encode_text(["red apple"])
