"""Stable-Diffusion-class backbones: UNet2DConditionModel + AutoencoderKL + CLIP text encoder.

One loader reads SD1.5 from a hub id or a folder, the embedded ``emoji-sd-v1``, and a random tiny pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from core.backbones.base import Cond
from core.backbones.pipeline import PipelineBackbone, cast, dtype_of
from core.config import UserError
from core.diffusion.guidance import fourier_features
from core.diffusion.process import Process, VPProcess


def _embedded(w: Tensor | None, unet: UNet2DConditionModel) -> Tensor | None:
    return None if w is None else cast(fourier_features(w, unet.config.time_cond_proj_dim), unet)


PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class UNetBackbone(PipelineBackbone):
    """See ``PipelineBackbone``. Conditioning: ``text`` (B, L, D), the encoder's last states."""

    pipeline = "StableDiffusionPipeline"
    network_folder, network_class, vae_class = "unet", UNet2DConditionModel, AutoencoderKL
    parts = "unet/, vae/, text_encoder/, tokenizer/, scheduler/"
    channels_last = True
    guidance_layers = ("time_embedding.cond_proj",)

    def _process(self, scheduler: Mapping[str, Any]) -> tuple[Process, str]:
        return VPProcess.from_config(scheduler), PREDICTIONS[scheduler.get("prediction_type", "epsilon")]

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(role) as unet:
            text, added = cast(cond.tensors["text"], unet), self.added_conditions(cond, dtype_of(unet))
            options = {"added_cond_kwargs": added, "timestep_cond": _embedded(cond.tensors.get("guidance"), unet)}
            return unet(cast(x_t, unet), t, encoder_hidden_states=text, **options).sample

    @staticmethod
    def add_guidance_layer(network: UNet2DConditionModel, width: int) -> None:
        """Latent consistency models' layer beside the time embedding's first, which diffusers' pipelines feed; zero."""
        embedding = network.time_embedding
        if embedding.cond_proj is not None:
            raise UserError(
                f"backbone.guidance_embedding={width}: this network takes guidance as an input already; allowed: 0"
            )
        first = embedding.linear_1
        embedding.cond_proj = nn.Linear(width, first.in_features, False, first.weight.device, first.weight.dtype)
        nn.init.zeros_(embedding.cond_proj.weight)
        network.register_to_config(time_cond_proj_dim=width)

    def added_conditions(self, cond: Cond, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Further inputs beside the time; None in Stable Diffusion 1, which has none."""
        return None

    def cond_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, self.roles.base.config.cross_attention_dim)}

    @staticmethod
    def half_forward(
        network: UNet2DConditionModel,
        x_t: Tensor,
        t: Tensor,
        text: Tensor,
        added: dict[str, Tensor] | None,
        stages: list[Tensor] | None = None,
    ) -> Tensor:
        """The encoder half: input convolution, down blocks, mid block (Flash Diffusion, Sec. 4.3).

        ``stages`` takes what each down block gives before it halves the size, and the mid block's output.
        """
        embedding = network.time_embedding(network.get_time_embed(x_t, t))
        augmented = network.get_aug_embed(embedding, text, added)
        embedding = embedding if augmented is None else embedding + augmented
        hidden = network.conv_in(x_t)
        for block in network.down_blocks:
            if getattr(block, "has_cross_attention", False):
                hidden, kept = block(hidden, embedding, encoder_hidden_states=text)
            else:
                hidden, kept = block(hidden, embedding)
            if stages is not None:
                stages.append(kept[-1 if block.downsamplers is None else -2])
        hidden = network.mid_block(hidden, embedding, encoder_hidden_states=text)
        if stages is not None:
            stages.append(hidden)
        return hidden

    def network_stages(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        found: list[Tensor] = []
        with self.roles.use(role) as network:
            network.half_forward(**self._half_inputs(network, x_t, t, cond), stages=found)
        return found

    def _half_inputs(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        text, added = cast(cond.tensors["text"], network), self.added_conditions(cond, dtype_of(network))
        return {"x_t": cast(x_t, network), "t": t, "text": text, "added": added}

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        channels = self.roles.base.config.block_out_channels
        size = self.latent_shape[1] // 2 ** (len(channels) - 1)
        return channels[-1], size, size

    @staticmethod
    def blocks(network: UNet2DConditionModel) -> list[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._component(CLIPTextModel, "text_encoder")

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return self._tokenizer(CLIPTokenizer, "tokenizer")

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        return Cond({"text": self.text_encoder(self._tokens(self.tokenizer, prompts)[0])[0]})
