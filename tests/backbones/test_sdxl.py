"""SDXL against diffusers' own pipeline, and the paper's parameter count."""

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

from core.backbones.base import TEACHER
from core.backbones.roles import Sharing
from core.backbones.sdxl import SDXLBackbone
from core.backbones.tiny import write_tiny_sdxl
from core.config import compose
from core.methods.teacher import teacher_sample
from core.sampler import Sampler
from tests import worlds

PROMPTS = ["red apple", ""]
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_sdxl(tmp_path_factory.mktemp("teacher") / "tiny-sdxl"))


@pytest.fixture(scope="module")
def backbone(folder: str) -> SDXLBackbone:
    return SDXLBackbone.load(folder, Sharing("lora", 4, 4, ("to_q", "to_k", "to_v", "to_out.0")))


@pytest.fixture(scope="module")
def pipeline(folder: str) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def test_the_papers_trainable_parameters() -> None:
    spec = compose("flash/sdxl", ["data.path=random:x"]).backbone
    with torch.device("meta"):
        sharing = Sharing("lora", spec.lora_rank, spec.lora_alpha, tuple(spec.lora_targets))
        built = SDXLBackbone.from_architecture(SDXL, {"beta_schedule": "scaled_linear"}, sharing)
        built.add_role("student", trainable=True)
    assert sum(p.numel() for p in built.role_parameters(TEACHER).values()) == 2_567_463_684
    assert sum(p.numel() for p in built.role_parameters("student").values()) == 92_897_280  # "92.9M"


def test_prompts_are_encoded_as_diffusers_does(backbone: SDXLBackbone, pipeline: StableDiffusionXLPipeline) -> None:
    ours = backbone.encode_text(PROMPTS)
    text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS[0], device="cpu", do_classifier_free_guidance=True)
    torch.testing.assert_close(ours.tensors["text"], torch.cat([text, null]))
    torch.testing.assert_close(ours.tensors["pooled"], torch.cat([pooled, null_pooled]))
    assert not ours.tensors["text"][1].any() and ours.tensors["text"][0].any()


def test_guided_samples_are_those_of_diffusers(backbone: SDXLBackbone, pipeline: StableDiffusionXLPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, null = backbone.encode_text(PROMPTS[:1]), backbone.encode_text([""])
    ours = teacher_sample(backbone, noise, cond, null, Sampler("dpmpp_2m", 4, 5.0))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", final_sigmas_type="zero", solver_type="midpoint"
    )
    theirs = pipeline(
        PROMPTS[0], height=64, width=64, latents=noise, num_inference_steps=4, guidance_scale=5.0, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_features_are_the_encoder_half(backbone: SDXLBackbone) -> None:
    caught = {}
    handle = backbone.roles.base.mid_block.register_forward_hook(lambda *a: caught.setdefault("mid", a[2]))
    x_t, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([999, 10]), backbone.encode_text(PROMPTS)
    backbone.predict(TEACHER, x_t, t, cond)
    handle.remove()
    found = backbone.features(TEACHER, x_t, t, cond)
    torch.testing.assert_close(found, caught["mid"])
    assert found.shape[1:] == backbone.feature_shape


def test_sdxl_trains_through_the_same_code(folder: str, tmp_path: Path) -> None:
    last = worlds.trained_on_pictures(tmp_path, "flash/sdxl", f"backbone.path={folder}", *worlds.MINIATURE)
    assert last["images"] == 8
