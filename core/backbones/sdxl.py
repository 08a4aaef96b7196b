"""Stable Diffusion XL: a UNet with two text encoders, whose pooled embedding and the image's size enter beside time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from core.backbones.base import Cond
from core.backbones.unet import UNetBackbone


class SDXLBackbone(UNetBackbone):
    """See ``UNetBackbone``. Conditioning: ``text`` (B, L, 2048), both encoders' last but one states; ``pooled``
    (B, 1280), the second encoder's projection. Every image is its own full-size, uncropped original."""

    pipeline = "StableDiffusionXLPipeline"

    def added_conditions(self, cond: Cond, dtype: torch.dtype) -> dict[str, Tensor]:
        side = self.latent_shape[1] * self.vae_scale
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=dtype, device=self.device)
        pooled = cond.tensors["pooled"].to(dtype)
        return {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}

    @cached_property
    def vae_scale(self) -> int:
        """Pixels of an image for each position of its latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @cached_property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        return self._component(CLIPTextModelWithProjection, "text_encoder_2")

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._component(CLIPTextModel, "text_encoder")

    @cached_property
    def tokenizer_2(self) -> CLIPTokenizer:
        assert self.source is not None
        return CLIPTokenizer.from_pretrained(self.source, subfolder="tokenizer_2", revision=self.revision or "main")

    @cached_property
    def empty_is_zero(self) -> bool:
        """Whether the empty prompt, the null conditioning, is all zeros (the released SDXL; not every fine-tune)."""
        return bool(_model_index(self.source, self.revision).get("force_zeros_for_empty_prompt", True))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        states, pooled = [], None
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            found = self._encode(tokenizer, encoder, prompts)
            states.append(found.hidden_states[-2])
            pooled = found[0]  # of the second encoder: the projected state of the end token
        text = torch.cat(states, dim=-1)
        if self.empty_is_zero:
            written = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
            text, pooled = text * written[:, None, None], pooled * written[:, None]
        return Cond({"text": text, "pooled": pooled})

    def _encode(self, tokenizer: CLIPTokenizer, encoder: nn.Module, prompts: Sequence[str]) -> Any:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return encoder(tokens.input_ids.to(self.device), output_hidden_states=True)


def _model_index(source: str | None, revision: str | None) -> dict[str, Any]:
    assert source is not None
    if Path(source).is_dir():
        return json.loads((Path(source) / "model_index.json").read_text())
    from huggingface_hub import hf_hub_download

    return json.loads(Path(hf_hub_download(source, "model_index.json", revision=revision)).read_text())
