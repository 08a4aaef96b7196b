"""PixArt-alpha against diffusers' own pipeline, and its published size."""

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

from core.backbones.base import STUDENT, TEACHER, Cond
from core.backbones.pixart import PixArtBackbone
from core.backbones.roles import Sharing
from core.backbones.tiny import write_tiny_pixart
from core.config import compose
from core.diffusion.solvers import few_step_sample
from core.diffusion.timesteps import trailing_timesteps
from core.methods.teacher import teacher_sample
from core.sampler import Sampler
from experiments.export import export
from tests import worlds

PROMPTS = ["Red apple ", ""]
PIXART = {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": True}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SHARING = Sharing("lora", 4, 4, ("to_q", "to_k", "to_v", "to_out.0"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_pixart(tmp_path_factory.mktemp("teacher") / "tiny-pixart"))


@pytest.fixture(scope="module")
def backbone(folder: str) -> PixArtBackbone:
    return PixArtBackbone.load(folder, SHARING)


@pytest.fixture(scope="module")
def pipeline(folder: str) -> PixArtAlphaPipeline:
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_published_network_builds_without_weights() -> None:
    spec = compose("flash/pixart", ["data.path=random:x"]).backbone
    with torch.device("meta"):
        sharing = Sharing("lora", spec.lora_rank, spec.lora_alpha, tuple(spec.lora_targets))
        built = PixArtBackbone.from_architecture(PIXART, LINEAR, sharing)
        built.add_role("student", trainable=True)
    assert sum(p.numel() for p in built.role_parameters(TEACHER).values()) == 611_349_152  # "0.6B"
    assert sum(p.numel() for p in built.role_parameters("student").values()) == 55_241_728  # the paper: 66.5M
    assert built.latent_shape == (4, 128, 128)


def test_prompts_are_encoded_as_diffusers_does(backbone: PixArtBackbone, pipeline: PixArtAlphaPipeline) -> None:
    text, mask, null, null_mask = pipeline.encode_prompt(PROMPTS[0], device="cpu")
    ours = backbone.encode_text(PROMPTS).tensors
    torch.testing.assert_close(ours["text"], torch.cat([text, null]))
    torch.testing.assert_close(ours["mask"], torch.cat([mask, null_mask]).float())
    assert ours["mask"][0].sum() > ours["mask"][1].sum() == 1


def test_guided_samples_are_those_of_diffusers(backbone: PixArtBackbone, pipeline: PixArtAlphaPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, null = backbone.encode_text(PROMPTS[:1]), backbone.encode_text([""])
    ours = teacher_sample(backbone, noise, cond, null, Sampler("dpmpp_2m", 4, 5.0))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", final_sigmas_type="zero", solver_type="midpoint"
    )
    theirs = pipeline(
        PROMPTS[0], latents=noise, num_inference_steps=4, guidance_scale=5.0, output_type="latent",
        use_resolution_binning=False,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_large_model_is_told_the_size_of_the_image() -> None:
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, caption_channels=32,
        norm_num_groups=4, sample_size=8, use_additional_conditions=True,
    )  # fmt: skip
    torch.nn.init.normal_(network.adaln_single.emb.resolution_embedder.linear_2.weight)
    backbone = PixArtBackbone(network, LINEAR, SHARING)
    x_t, t, text, mask = torch.randn(2, 4, 8, 8), torch.tensor([999, 10]), torch.randn(2, 5, 32), torch.ones(2, 5)
    told = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    theirs = network(x_t, text, t, encoder_attention_mask=mask, added_cond_kwargs=told).sample[:, :4]
    ours = backbone.network(TEACHER, x_t, t, Cond({"text": text, "mask": mask}))
    torch.testing.assert_close(ours, theirs)


def test_features_are_what_half_of_the_blocks_hand_on(backbone: PixArtBackbone) -> None:
    caught = []
    handle = backbone.roles.base.transformer_blocks[1].register_forward_hook(lambda *a: caught.append(a[2]))
    x_t, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([999, 10]), backbone.encode_text(PROMPTS)
    backbone.predict(TEACHER, x_t, t, cond)
    handle.remove()
    found = backbone.features(TEACHER, x_t, t, cond)
    assert found.shape[1:] == backbone.feature_shape
    torch.testing.assert_close(found.flatten(2).mT, caught[0])


def test_an_exported_student_is_a_whole_network(
    folder: str, pipeline: PixArtAlphaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' pipeline reads no LoRA: the adapter is added to the weights."""
    backbone = PixArtBackbone.load(folder, Sharing("lora", 4, 2, ("to_q", "to_v", "ff.net.2", "proj")))
    backbone.add_role(STUDENT, trainable=True)
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.role_parameters(STUDENT).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    before = {name: value.clone() for name, value in backbone.role_parameters(TEACHER).items()}
    out = export(backbone, tmp_path / "out", Sampler("lcm", 2))
    usage = (out / "README.md").read_text()
    assert "PixArtTransformer2DModel.from_pretrained" in usage and "load_lora_weights" not in usage
    assert all(torch.equal(value, before[name]) for name, value in backbone.role_parameters(TEACHER).items())
    pipeline.transformer = PixArtTransformer2DModel.from_pretrained(out, subfolder="transformer")
    pipeline.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    noises = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2)]
    rest = iter(noises[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: next(rest))
    theirs = pipeline(
        PROMPTS[0], latents=noises[0], num_inference_steps=2, guidance_scale=1.0, output_type="latent",
        use_resolution_binning=False,
    ).images  # fmt: skip
    cond = backbone.encode_text(PROMPTS[:1])
    with torch.no_grad():
        ours, teacher = (
            few_step_sample(
                lambda x, t, rows, role=role: backbone.predict(role, x, t, cond),
                noises,
                trailing_timesteps(2, 1000),
                backbone.process,
            )
            for role in (STUDENT, TEACHER)
        )
    assert (ours - teacher).abs().max() > 0.02, "the student must differ"
    assert (ours - theirs).abs().max() < 1e-3


def test_pixart_trains_through_the_same_code(folder: str, tmp_path: Path) -> None:
    last = worlds.trained_on_pictures(tmp_path, "flash/pixart", f"backbone.path={folder}", *worlds.MINIATURE)
    assert last["images"] == 8
