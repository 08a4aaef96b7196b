"""Stable Diffusion XL: a UNet with two text encoders, whose pooled embedding and the image's size enter beside time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from core.backbones.base import Cond
from core.backbones.pipeline import read_json
from core.backbones.unet import UNetBackbone


class SDXLBackbone(UNetBackbone):
    """See ``UNetBackbone``. Conditioning: ``text`` (B, L, 2048), both encoders' last but one states; ``pooled``
    (B, 1280), the second encoder's projection. Every image is its own full-size, uncropped original."""

    pipeline = "StableDiffusionXLPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")

    def added_conditions(self, cond: Cond, dtype: torch.dtype) -> dict[str, Tensor]:
        side = self.image_side
        pooled = cond.tensors["pooled"].to(dtype)
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=dtype).to(pooled.device, non_blocking=True)
        return {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}

    def cond_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.roles.base.config  # beside the pooled embedding: six numbers of ``added_conditions``
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return super().cond_shapes(tokens) | {"pooled": (pooled,)}

    @cached_property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        return self._component(CLIPTextModelWithProjection, "text_encoder_2")

    @cached_property
    def tokenizer_2(self) -> CLIPTokenizer:
        return self._tokenizer(CLIPTokenizer, "tokenizer_2")

    @cached_property
    def empty_is_zero(self) -> bool:
        """Whether the empty prompt, the null conditioning, is all zeros (the released SDXL; not every fine-tune)."""
        assert self.source is not None
        index = read_json(self.source, "model_index.json", self.revision)
        return bool(index.get("force_zeros_for_empty_prompt", True))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        states, pooled = [], None
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            found = encoder(self._tokens(tokenizer, prompts)[0], output_hidden_states=True)
            states.append(found.hidden_states[-2])
            pooled = found[0]  # of the second encoder: the projected state of the end token
        text = torch.cat(states, dim=-1)
        if self.empty_is_zero:
            written = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
            text, pooled = text * written[:, None, None], pooled * written[:, None]
        return Cond({"text": text, "pooled": pooled})
