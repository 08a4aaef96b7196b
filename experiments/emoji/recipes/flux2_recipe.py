"""The miniature FLUX.2: its parts, how its latents come from the embedded VAE, and the pipeline folder that it becomes.

Rectified flow on 4x4 patches of four latents, a language model of Qwen's kind as text encoder (trained with the
transformer), classifier-free guidance as in FLUX.2 klein.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from core.data.shards import Example
from experiments.emoji.tokenizer import MAX_TOKENS, VOCABULARY, corpus

LAYERS = (1, 2, 3)  # states of the text encoder's four layers: a quarter, a half and three quarters of it
START, END = "<|im_start|>", "<|endoftext|>"
# The message after a first token, without which an empty prompt would have nothing to attend to
TEMPLATE = "{{ '" + START + "' }}{% for message in messages %}{{ message.content }}{% endfor %}"


def train_tokenizer(examples: list[Example], folder: Path) -> Qwen2TokenizerFast:
    """Byte-level merges learned on every caption level; written as an ordinary tokenizer folder, opened if written."""
    if not (folder / "tokenizer.json").exists():
        like = Qwen2TokenizerFast(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
        model = Tokenizer(models.BPE())
        model.normalizer, model.pre_tokenizer = like.normalizer, like.pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[START, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(corpus(examples), trainer)
        learned = json.loads(model.to_str())["model"]
        merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
        tokenizer = Qwen2TokenizerFast(
            vocab=learned["vocab"], merges=merges, pad_token=END, eos_token=END, model_max_length=MAX_TOKENS,
            additional_special_tokens=[START],
        )  # fmt: skip
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return Qwen2TokenizerFast.from_pretrained(folder)


def build_transformer(latent_channels: int, width: int = 128) -> Flux2Transformer2DModel:
    """3.6M parameters: one double and four single blocks of six heads, on patches of 2x2 latents."""
    return Flux2Transformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=len(LAYERS) * width,
        timestep_guidance_channels=128,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )


def build_text_encoder(tokenizer: Qwen2TokenizerFast, width: int = 128) -> Qwen3ForCausalLM:
    """1M parameters, of which the last layer is not read, as in FLUX.2 klein."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=width // 4,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Networks(nn.Module):
    """Transformer and text encoder as one module: latents, times (in [0, 1]), token ids to the predicted velocity."""

    def __init__(self, tokenizer: Qwen2TokenizerFast, latent_channels: int) -> None:
        super().__init__()
        self.transformer, self.text_encoder = build_transformer(latent_channels), build_text_encoder(tokenizer)
        side, first = torch.arange(4), torch.arange(1)
        self.register_buffer("img_ids", torch.cartesian_prod(first, side, side, first), persistent=False)
        self.register_buffer("txt_ids", torch.cartesian_prod(first, first, first, torch.arange(MAX_TOKENS)), False)
        self.pad = tokenizer.pad_token_id

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        states = self.text_encoder.model(ids, attention_mask=(ids != self.pad).long(), output_hidden_states=True)
        text = torch.cat([states.hidden_states[layer] for layer in LAYERS], dim=-1)
        tokens = self.transformer(
            x_t.flatten(2).mT, text, t, self.img_ids, self.txt_ids, guidance=None, return_dict=False
        )[0]
        return tokens.mT.unflatten(2, x_t.shape[2:])


class Flux2Recipe:
    """The networks that ``experiments.emoji.recipes.train_teacher --family flux2`` trains, and their data."""

    outside = ("embed", "proj_out", "lm_head")  # of Muon

    def __init__(self, examples: list[Example], folder: Path) -> None:
        self.tokenizer = train_tokenizer(examples, folder / "tokenizer")
        self.mean, self.variance = torch.zeros(0), torch.ones(0)  # of each channel of a patch, known from latents

    def networks(self, latent_channels: int) -> Networks:
        return Networks(self.tokenizer, latent_channels)

    def latents(self, scaled: Tensor, vae: AutoencoderKL) -> Tensor:
        """Patches (N, 4 C, 4, 4) float16 of the VAE's latents, each channel with mean 0 and variance 1."""
        patches = Flux2Pipeline._patchify_latents(scaled.float() / vae.config.scaling_factor)
        self.mean, self.variance = patches.mean((0, 2, 3)), patches.var((0, 2, 3))
        scale = (self.variance + 1e-4).sqrt()
        return ((patches - self.mean.view(1, -1, 1, 1)) / scale.view(1, -1, 1, 1)).half()

    def ids(self, captions: list[str]) -> Tensor:
        """int64 (n + 1, MAX_TOKENS): ids of the captions as the pipeline writes them, then of the empty caption."""
        texts = [f"{START}{caption}" for caption in [*captions, ""]]
        settings = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(texts, **settings).input_ids

    def noised(self, x0: Tensor, eps: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t in (0, 1), and the velocity eps - x0 (rectified flow)."""
        t = uniform.float()
        sigma = t.view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * eps, t, eps - x0

    def export(self, folder: Path, networks: Networks, vae: AutoencoderKL) -> None:
        """Write an ordinary Flux2KleinPipeline folder with float16 weights."""
        pipeline = Flux2KleinPipeline(
            transformer=copy.deepcopy(networks.transformer).half(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=self._vae(vae).half(),
            text_encoder=copy.deepcopy(networks.text_encoder).half(),
            tokenizer=self.tokenizer,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
        # transformers loads in the dtype its config names, diffusers in float32: without this they would disagree.
        config = folder / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))

    def _vae(self, vae: AutoencoderKL) -> AutoencoderKLFlux2:
        """The same encoder and decoder, with the patches' statistics."""
        names = (
            "block_out_channels", "down_block_types", "up_block_types", "latent_channels", "layers_per_block",
            "norm_num_groups", "sample_size", "mid_block_add_attention",
        )  # fmt: skip
        out = AutoencoderKLFlux2(**{name: vae.config[name] for name in names})
        missing, unexpected = out.load_state_dict(vae.state_dict(), strict=False)
        assert not unexpected and all(name.startswith("bn.") for name in missing), (missing, unexpected)
        out.bn.running_mean.copy_(self.mean)
        out.bn.running_var.copy_(self.variance)
        return out
