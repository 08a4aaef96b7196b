"""Stable-Diffusion-class backbones: UNet2DConditionModel + AutoencoderKL + CLIP text encoder.

One loader reads SD1.5 from a hub id or a folder, the embedded ``emoji-sd-v1``, and a random tiny pipeline.
The VAE and the text encoder load at first use: training reads cached latents and embeddings and never touches them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from core.backbones.base import Backbone, Cond
from core.backbones.roles import Roles, Sharing
from core.config import UserError
from core.diffusion.process import VPProcess

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class UNetBackbone(Backbone):
    """See ``Backbone``. ``source`` is a pipeline folder or hub id; None only for a network built from its config."""

    pipeline = "StableDiffusionPipeline"  # of diffusers

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Mapping[str, Any],
        sharing: Sharing,
        *,
        source: str | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.roles = Roles(unet, sharing)
        self.process = VPProcess.from_config(scheduler)
        self.prediction = PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
        size = unet.config.sample_size
        self.latent_shape = (unet.config.in_channels, size, size)
        self.source, self.revision, self.device = source, revision, torch.device(device)

    @classmethod
    def load(
        cls,
        source: str,
        sharing: Sharing,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> UNetBackbone:
        """Load a pipeline folder or hub id; ``UserError`` names what is missing."""
        options = {"revision": revision} if revision else {}
        try:
            scheduler = read_json(source, "scheduler/scheduler_config.json", revision)
            unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", torch_dtype=dtype, **options)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(
                f"backbone.path={source}: no Stable Diffusion pipeline can be read there"
                f" (needs unet/, vae/, text_encoder/, tokenizer/, scheduler/): {str(error).splitlines()[0]}"
            ) from error
        return cls(unet.to(device), scheduler, sharing, source=source, revision=revision, device=device)

    @classmethod
    def from_architecture(
        cls, architecture: Mapping[str, Any], scheduler: Mapping[str, Any], sharing: Sharing
    ) -> UNetBackbone:
        """A network without weights (call it under ``torch.device("meta")`` to count parameters)."""
        return cls(UNet2DConditionModel(**architecture), scheduler, sharing)

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(role) as unet:
            text, added = _cast(cond.tensors["text"], unet), self.added_conditions(cond, unet.dtype)
            return unet(_cast(x_t, unet), t, encoder_hidden_states=text, added_cond_kwargs=added).sample

    def added_conditions(self, cond: Cond, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """What enters beside the time embedding; nothing in Stable Diffusion 1."""
        return None

    def network_features(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The UNet's encoder half: input convolution, down blocks, mid block (Flash Diffusion, Sec. 4.3)."""
        with self.roles.use(role) as unet:
            x_t, text = _cast(x_t, unet), _cast(cond.tensors["text"], unet)
            embedding = unet.time_embedding(unet.get_time_embed(x_t, t))
            added = unet.get_aug_embed(embedding, text, self.added_conditions(cond, unet.dtype))
            embedding = embedding if added is None else embedding + added
            hidden = unet.conv_in(x_t)
            for block in unet.down_blocks:
                if getattr(block, "has_cross_attention", False):
                    hidden, _ = block(hidden, embedding, encoder_hidden_states=text)
                else:
                    hidden, _ = block(hidden, embedding)
            return unet.mid_block(hidden, embedding, encoder_hidden_states=text)

    def add_role(self, role: str, like: str | None = None, *, trainable: bool, seed: int = 0) -> None:
        self.roles.add(role, like, trainable=trainable, seed=seed)

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        return self.roles.parameters(role)

    def enable_activation_checkpointing(self) -> None:
        """Trade compute for memory; call after every role has been added."""
        for module in (self.roles.base, *self.roles._copies.values()):
            module.enable_gradient_checkpointing(self.roles.checkpointing())
            module.train()  # diffusers checkpoints in train mode only; these networks have no dropout

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        channels = self.roles.base.config.block_out_channels
        size = self.latent_shape[1] // 2 ** (len(channels) - 1)
        return channels[-1], size, size

    def shard_units(self) -> list[nn.Module]:
        unet = self.roles.base
        return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]

    # Pixels and text.
    def _component(self, kind: type, name: str) -> nn.Module:
        options = {"revision": self.revision} if self.revision else {}
        assert self.source is not None, "a backbone built from its config alone has no VAE or text encoder"
        try:
            module = kind.from_pretrained(self.source, subfolder=name, torch_dtype=torch.float32, **options)
        except OSError as error:
            raise UserError(f"{self.source}/{name}: cannot be loaded: {str(error).splitlines()[0]}") from error
        return module.to(self.device).eval().requires_grad_(False)

    @cached_property
    def vae(self) -> AutoencoderKL:
        return self._component(AutoencoderKL, "vae")

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._component(CLIPTextModel, "text_encoder")

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return self._load_tokenizer("tokenizer")

    def _load_tokenizer(self, name: str) -> CLIPTokenizer:
        assert self.source is not None
        return CLIPTokenizer.from_pretrained(self.source, subfolder=name, revision=self.revision or "main")

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor

    def pixels(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.device).float() / self.vae.config.scaling_factor).sample

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        return Cond({"text": self.text_encoder(self._tokens(self.tokenizer, prompts))[0]})

    def _tokens(self, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded and cut to the tokenizer's length."""
        length = tokenizer.model_max_length
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.device)


def _cast(value: Tensor, module: nn.Module) -> Tensor:
    """To the network's storage dtype (autocast, when on, decides the compute dtype)."""
    return value.to(module.dtype)


def read_json(source: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a pipeline folder or of a hub id."""
    if Path(source).is_dir():
        return json.loads((Path(source) / name).read_text())
    from huggingface_hub import hf_hub_download  # only hub ids need the hub

    return json.loads(Path(hf_hub_download(source, name, revision=revision)).read_text())
