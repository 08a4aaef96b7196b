"""Random tiny pipelines of the real classes, written as ordinary folders so that the one loader reads them too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from core.backbones.roles import keyed_init
from core.run import atomic_folder

START, END = "<|startoftext|>", "<|endoftext|>"
PARTS_TEMPLATE = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789-:,.'&!"


def _written_once(name: str) -> Callable[[Callable[..., None]], Callable[..., Path]]:
    """A folder that is there is left alone; otherwise it appears whole, with numbers that ``name`` alone decides."""

    def decorate(write: Callable[..., None]) -> Callable[..., Path]:
        @functools.wraps(write)
        def once(folder: Path, **options: Any) -> Path:
            folder = Path(folder)
            if not folder.exists():
                with keyed_init(name), atomic_folder(folder) as target:
                    write(target, **options)
            return folder

        return once

    return decorate


@_written_once("tiny-sd")
def write_tiny_sd(target: Path) -> None:
    """A Stable-Diffusion-class pipeline of about 60k parameters: 64x64 images, 4-channel 8x8 latents."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    tokenizer = _character_tokenizer()
    _write_sd(target, unet, _tiny_vae(), CLIPTextModel(_text_config(tokenizer, 16)), tokenizer)


def _write_sd(
    target: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(target)


@_written_once("random-sd")
def write_random_sd(target: Path) -> None:
    """A Stable-Diffusion-class pipeline with a UNet of 50M parameters, for measurements: 16x16 latents."""
    tokenizer = _character_tokenizer()
    _write_sd(
        target,
        UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(128, 256, 384),
            layers_per_block=2,
            cross_attention_dim=256,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        _tiny_vae(),
        CLIPTextModel(_text_config(tokenizer, 256)),
        tokenizer,
    )


@_written_once("tiny-sdxl")
def write_tiny_sdxl(target: Path) -> None:
    """An SDXL-class pipeline: two text encoders of different widths, 64x64 images, 4-channel 8x8 latents."""
    tokenizer = _character_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    StableDiffusionXLPipeline(
        vae=_tiny_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 16)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, 24, projection_dim=12)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=_tiny_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(target)


@_written_once("tiny-pixart")
def write_tiny_pixart(target: Path) -> None:
    """A PixArt-alpha-class pipeline: 64x64 images, 4-channel 8x8 latents, noise and variance predicted."""
    tokenizer = _character_t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(_t5_config(tokenizer)),
        vae=_tiny_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(target)


@_written_once("tiny-sd3")
def write_tiny_sd3(target: Path) -> None:
    """A Stable-Diffusion-3-class pipeline with all three text encoders: 64x64 images, 4-channel 8x8 latents."""
    tokenizer, long_tokenizer = _character_tokenizer(), _character_t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 8,
        pos_embed_max_size=8,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**TINY_VAE, shift_factor=0.1, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer, 16, projection_dim=12)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, 8, projection_dim=8)),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(_t5_config(long_tokenizer)),
        tokenizer_3=long_tokenizer,
    ).save_pretrained(target)


@_written_once("tiny-flux2")
def write_tiny_flux2(target: Path) -> None:
    """A FLUX.2-klein-class pipeline: 64x64 images, 16-channel 4x4 latents of patches, a language model of 4 layers."""
    tokenizer, parts = _character_chat_tokenizer(), _tiny_flux2_parts(guidance_embeds=False)
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    pipeline = Flux2KleinPipeline(**parts, text_encoder=Qwen3ForCausalLM(text), tokenizer=tokenizer)
    pipeline.save_pretrained(target)


@_written_once("tiny-flux2-dev")
def write_tiny_flux2_dev(target: Path) -> None:
    """A FLUX.2-dev-class pipeline: guidance is an input, and the language model one that could also see."""
    tokenizer, parts = _character_chat_tokenizer(), _tiny_flux2_parts(guidance_embeds=True)
    images = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    tokenizer.add_special_tokens({"additional_special_tokens": list(images.values()), "pad_token": END})
    tokenizer.model_max_length = 512  # the pipeline's instruction comes before the prompt
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 8}, patch_size=4), tokenizer=tokenizer,
        patch_size=4, chat_template=PARTS_TEMPLATE, **images,
    )  # fmt: skip
    heads = {"num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8, "hidden_size": 16}
    text = MistralConfig(
        vocab_size=len(tokenizer), intermediate_size=32, num_key_value_heads=2, max_position_embeddings=512, **heads
    )
    vision = PixtralVisionConfig(intermediate_size=16, image_size=8, patch_size=4, **(heads | {"num_hidden_layers": 1}))
    config = Mistral3Config(
        text_config=text, vision_config=vision, spatial_merge_size=1,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )  # fmt: skip
    pipeline = Flux2Pipeline(**parts, text_encoder=Mistral3ForConditionalGeneration(config), tokenizer=processor)
    pipeline.save_pretrained(target)


def _tiny_flux2_parts(*, guidance_embeds: bool) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(**TINY_VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return {
        "transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }  # fmt: skip


TINY_VAE: dict[str, Any] = {
    "block_out_channels": (4, 4, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 64,
}  # fmt: skip


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(**TINY_VAE)


def _text_config(tokenizer: CLIPTokenizer, width: int, **more: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2 if more else 1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )


def _t5_config(tokenizer: T5TokenizerFast) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip


def _tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )


def _character_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer class with single characters as its vocabulary and no merges."""
    symbols = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), START, END]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def _character_chat_tokenizer() -> Qwen2TokenizerFast:
    """Qwen's tokenizer class with single characters, and a chat template that is the message itself."""
    symbols = [*CHARACTERS, "Ġ", "<|endoftext|>"]  # a space, as byte-level tokenizers write it
    tokenizer = Qwen2TokenizerFast(
        vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], model_max_length=32, unk_token="-"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


def _character_t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer class with single characters."""
    symbols = ["<pad>", "</s>", "<unk>", "▁", *CHARACTERS]
    return T5TokenizerFast(vocab=[(symbol, -float(i > 2)) for i, symbol in enumerate(symbols)], extra_ids=0)
