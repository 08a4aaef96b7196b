"""Random tiny pipelines of the real classes, written as ordinary folders so that the one loader reads them too."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from core.backbones.roles import keyed_init
from core.run import atomic_folder

START, END = "<|startoftext|>", "<|endoftext|>"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789-:,.'&!"


def write_tiny_sd(folder: Path) -> Path:
    """A Stable-Diffusion-class pipeline of about 60k parameters: 64x64 images, 4-channel 8x8 latents."""
    folder = Path(folder)
    if folder.exists():
        return folder
    with keyed_init("tiny-sd"), atomic_folder(folder) as target:
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
        vae = _tiny_vae()
        tokenizer = _character_tokenizer()
        text_encoder = CLIPTextModel(_text_config(tokenizer, 16))
        scheduler = _tiny_scheduler()
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(target)
    return folder


def write_tiny_sdxl(folder: Path) -> Path:
    """An SDXL-class pipeline: two text encoders of different widths, 64x64 images, 4-channel 8x8 latents."""
    folder = Path(folder)
    if folder.exists():
        return folder
    with keyed_init("tiny-sdxl"), atomic_folder(folder) as target:
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
    return folder


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


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


def _tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )


def _character_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer class with single characters as its vocabulary and no merges."""
    symbols = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), START, END]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
