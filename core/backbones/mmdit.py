"""Stable Diffusion 3: a multimodal transformer with rectified flow, two CLIP encoders and an optional T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from core.backbones.base import Cond
from core.backbones.pipeline import TransformerBackbone, as_map, call_block, cast, read_json
from core.diffusion.process import FlowProcess, Process

T5_TOKENS = 256  # as diffusers' pipeline


class SD3Backbone(TransformerBackbone):
    """See ``TransformerBackbone``. Conditioning: ``text`` (B, L, D), CLIP's last but one states, then T5's; ``pooled``
    (B, P), both CLIP projections."""

    pipeline = "StableDiffusion3Pipeline"
    network_class, vae_class = SD3Transformer2DModel, AutoencoderKL
    text_encoders = ("clip", "t5")
    parts = "transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/, scheduler/"

    def _process(self, scheduler: Mapping[str, Any]) -> tuple[Process, str]:
        return FlowProcess(scheduler.get("shift", 1.0)), "flow"

    def _from_vae(self, latents: Tensor) -> Tensor:
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(role) as net:
            text, pooled = (cast(cond.tensors[name], net) for name in ("text", "pooled"))
            return net(cast(x_t, net), text, pooled, t.float()).sample  # t stays fp32: bf16 rounds 750 to 752

    def cond_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.roles.base.config
        return {"text": (tokens + T5_TOKENS, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    @staticmethod
    def half_forward(network: SD3Transformer2DModel, x_t: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """The image's tokens after half of the blocks, as a map."""
        embedding, image = network.time_text_embed(t, pooled), network.pos_embed(x_t)
        text = network.context_embedder(text)
        for block in network.transformer_blocks[: len(network.transformer_blocks) // 2]:
            text, image = call_block(network, block, image, text, embedding)
        return as_map(network, image, x_t)

    def _half_inputs(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        text, pooled = (cast(cond.tensors[name], network) for name in ("text", "pooled"))
        return {"x_t": cast(x_t, network), "t": t.float(), "text": text, "pooled": pooled}

    @cached_property
    def clip(self) -> list[tuple[CLIPTokenizer, CLIPTextModelWithProjection]]:
        """Both CLIP encoders with their tokenizers."""
        return [
            (
                self._tokenizer(CLIPTokenizer, f"tokenizer{n}"),
                self._component(CLIPTextModelWithProjection, f"text_encoder{n}"),
            )
            for n in ("", "_2")
        ]

    @cached_property
    def t5(self) -> tuple[T5TokenizerFast, T5EncoderModel] | None:
        """T5, unless the pipeline comes without it."""
        assert self.source is not None
        if read_json(self.source, "model_index.json", self.revision).get("text_encoder_3", [None])[0] is None:
            return None
        return self._tokenizer(T5TokenizerFast, "tokenizer_3"), self._component(T5EncoderModel, "text_encoder_3")

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        states, pooled = [], []
        for tokenizer, encoder in self.clip:
            ids, _ = self._tokens(tokenizer, prompts)
            found = encoder(ids, output_hidden_states=True)
            states.append(found.hidden_states[-2])
            pooled.append(found[0])
        width = self.roles.base.config.joint_attention_dim
        text = F.pad(torch.cat(states, dim=-1), (0, width - sum(found.shape[-1] for found in states)))
        return Cond(
            {"text": torch.cat([text, self._long_text(prompts, width)], dim=1), "pooled": torch.cat(pooled, -1)}
        )

    def _long_text(self, prompts: Sequence[str], width: int) -> Tensor:
        """T5's states (B, T5_TOKENS, width); zeros without T5."""
        if self.t5 is None:
            return torch.zeros(len(prompts), T5_TOKENS, width, device=self.device)
        tokenizer, encoder = self.t5
        return encoder(self._tokens(tokenizer, prompts, T5_TOKENS)[0])[0]
