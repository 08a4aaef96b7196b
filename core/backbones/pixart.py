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
from core.backbones.pipeline import PipelineBackbone, call_block, cast
from core.diffusion.process import Process, VPProcess

MAX_TOKENS = 120  # as diffusers' pipeline
VAE_SCALE = 8  # pixels of an image for each position of its latent, of the released models


class PixArtBackbone(PipelineBackbone):
    """See ``PipelineBackbone``. Conditioning: ``text`` (B, L, D), T5's states; ``mask`` (B, L), 1 where a token is.
    Every image is square, of the network's own size."""

    pipeline = "PixArtAlphaPipeline"
    network_folder, network_class, vae_class = "transformer", PixArtTransformer2DModel, AutoencoderKL
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
        """What the 1024-pixel model is told of the image beside the time."""
        if not network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        size = torch.tensor([x_t.shape[2:]], device=x_t.device).expand(len(x_t), 2) * VAE_SCALE
        return {"resolution": cast(size, network), "aspect_ratio": cast(size[:, :1] / size[:, 1:], network)}

    @staticmethod
    def half_forward(
        network: PixArtTransformer2DModel, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor, size: dict[str, Any]
    ) -> Tensor:
        """The image's tokens after half of the blocks, as a map."""
        bias, patch = (1 - mask.to(x_t.dtype))[:, None] * -10000.0, network.config.patch_size
        hidden, text = network.pos_embed(x_t), network.caption_projection(text)
        embedding, _ = network.adaln_single(t, size, batch_size=len(x_t), hidden_dtype=x_t.dtype)
        for block in network.transformer_blocks[: len(network.transformer_blocks) // 2]:
            hidden = call_block(network, block, hidden, None, text, bias, embedding, None, None)
        return hidden.mT.unflatten(2, (x_t.shape[2] // patch, x_t.shape[3] // patch))

    def _half_inputs(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        text, mask = (cast(cond.tensors[name], network) for name in ("text", "mask"))
        return {"x_t": cast(x_t, network), "t": t, "text": text, "mask": mask, "size": self._size(network, x_t)}

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        size = self.latent_shape[1] // self.roles.base.config.patch_size
        return self.roles.base.inner_dim, size, size

    def shard_units(self) -> list[nn.Module]:
        return [block for net in self.roles.modules() for block in net.transformer_blocks]

    @cached_property
    def text_encoder(self) -> T5EncoderModel:
        return self._component(T5EncoderModel, "text_encoder")

    @cached_property
    def tokenizer(self) -> T5TokenizerFast:
        return self._tokenizer(T5TokenizerFast, "tokenizer")

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        texts = [prompt.lower().strip() for prompt in prompts]  # as the pipeline does without its caption cleaning
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(self.device)
        text = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return Cond({"text": text, "mask": tokens.attention_mask.to(text)})
