"""PixArt-alpha: a diffusion transformer with cross-attention to T5's states; it predicts noise and its variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel, T5TokenizerFast

from core.backbones.base import Cond
from core.backbones.pipeline import TransformerBackbone, as_map, call_block, cast
from core.diffusion.process import Process, VPProcess

MAX_TOKENS = 120  # as diffusers' pipeline


class PixArtBackbone(TransformerBackbone):
    """See ``TransformerBackbone``. Conditioning: ``text`` (B, L, D), T5's states; ``mask`` (B, L), 1 where a token is.
    Every image is square, of the network's own size."""

    pipeline = "PixArtAlphaPipeline"
    network_class, vae_class = PixArtTransformer2DModel, AutoencoderKL
    parts = "transformer/, vae/, text_encoder/, tokenizer/, scheduler/"

    def _process(self, scheduler: Mapping[str, Any]) -> tuple[Process, str]:
        return VPProcess.from_config(scheduler), "eps"

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(role) as net:
            text, mask = (cast(cond.tensors[name], net) for name in ("text", "mask"))
            size = self._size(net, x_t)
            out = net(cast(x_t, net), text, t, encoder_attention_mask=mask, added_cond_kwargs=size).sample
            return out[:, : x_t.shape[1]]  # behind it: the variance, which no solver here reads

    def _size(self, network: nn.Module, x_t: Tensor) -> dict[str, Tensor | None]:
        """The image's resolution and aspect ratio, which the 1024-pixel model takes beside the time."""
        if not network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        size = torch.tensor([x_t.shape[2:]]).to(x_t.device, non_blocking=True).expand(len(x_t), 2) * self.vae_scale
        return {"resolution": cast(size, network), "aspect_ratio": cast(size[:, :1] / size[:, 1:], network)}

    def cond_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (MAX_TOKENS, self.roles.base.config.caption_channels), "mask": (MAX_TOKENS,)}

    @staticmethod
    def half_forward(
        network: PixArtTransformer2DModel, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor, size: dict[str, Any]
    ) -> Tensor:
        """The image's tokens after half of the blocks, as a map."""
        bias = (1 - mask.to(x_t.dtype))[:, None] * -10000.0
        hidden, text = network.pos_embed(x_t), network.caption_projection(text)
        embedding, _ = network.adaln_single(t, size, batch_size=len(x_t), hidden_dtype=x_t.dtype)
        for block in network.transformer_blocks[: len(network.transformer_blocks) // 2]:
            hidden = call_block(network, block, hidden, None, text, bias, embedding, None, None)
        return as_map(network, hidden, x_t)

    def _half_inputs(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        text, mask = (cast(cond.tensors[name], network) for name in ("text", "mask"))
        return {"x_t": cast(x_t, network), "t": t, "text": text, "mask": mask, "size": self._size(network, x_t)}

    @cached_property
    def text_encoder(self) -> T5EncoderModel:
        return self._component(T5EncoderModel, "text_encoder")

    @cached_property
    def tokenizer(self) -> T5TokenizerFast:
        return self._tokenizer(T5TokenizerFast, "tokenizer")

    def call_options(self) -> dict[str, Any]:
        return super().call_options() | {"use_resolution_binning": False, "clean_caption": False}

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        texts = [prompt.lower().strip() for prompt in prompts]  # as the pipeline does without its caption cleaning
        ids, mask = self._tokens(self.tokenizer, texts, MAX_TOKENS)
        text = self.text_encoder(ids, attention_mask=mask)[0]
        return Cond({"text": text, "mask": mask.to(text)})
