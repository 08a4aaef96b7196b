"""Diffusers pipelines as backbones: all have one denoising network with roles, a VAE, and text encoders.

The same loader reads a hub id, a folder, an embedded teacher and a random tiny pipeline. The VAE and the text encoders
load at first use. Training reads cached latents and embeddings, so the text encoders are released before it begins
(that of FLUX.2 dev is half as large as its network).
"""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from core.backbones.adapters import merge_into
from core.backbones.base import Backbone, Cond, compile_block
from core.backbones.merged import merged_bytes
from core.backbones.precision import recomputed
from core.backbones.roles import Roles, Sharing
from core.backbones.tenants import OwnRoles
from core.config import UserError
from core.diffusion.process import Process

SCHEDULER = "scheduler/scheduler_config.json"  # in a pipeline's folder


class PipelineBackbone(Backbone):
    """See ``Backbone``. ``source`` is a pipeline folder or hub id; None only for a network built from its config."""

    pipeline: ClassVar[str]  # of diffusers
    network_folder: ClassVar[str]
    network_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    parts: ClassVar[str]  # the folders that a pipeline of this family has
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)  # the attributes that hold them
    # A base that stays frozen has its convolutions' weights in channels last: a tenth of a training step on a CPU, and
    # what tensor cores want. Copies that train start to the last bit as the teacher, so there none has
    channels_last: ClassVar[bool] = False
    student_guidance: float = 1.0  # what a pipeline is told when it samples a student: no guidance

    def __init__(
        self,
        network: nn.Module,
        scheduler: Mapping[str, Any],
        sharing: Sharing,
        *,
        source: str | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        guidance_embedding: int = 0,
    ) -> None:
        super().__init__()
        if guidance_embedding:
            self.add_guidance_layer(network, guidance_embedding)
            self.has_guidance_layer = True
        # A method of the network: FSDP2 then gathers what it reads, as it does for a whole forward
        network.half_forward = MethodType(type(self).half_forward, network)
        self.roles = Roles(network, sharing)
        self.latent_shape = self._latent_shape(network)
        self.process, self.prediction = self._process(scheduler)
        self.source, self.revision, self.device = source, revision, torch.device(device)
        self._loaded: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()  # parts that somebody holds

    # What a family says of its network and its latents.
    def _latent_shape(self, network: nn.Module) -> tuple[int, int, int]:
        size = network.config.sample_size
        return network.config.in_channels, size, size

    @staticmethod
    def add_guidance_layer(network: nn.Module, width: int) -> None:
        """Give the network an input for guidance, of ``width`` Fourier features, that changes nothing yet."""
        raise UserError(f"backbone.guidance_embedding={width}: there is no such input for this family; allowed: 0")

    def _resize(self, image_size: int, vae: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:  # noqa: B027
        """Latents of images of ``image_size`` pixels, for networks that do not fix the size of theirs."""

    @abstractmethod
    def _process(self, scheduler: Mapping[str, Any]) -> tuple[Process, str]:
        """The noising process of the scheduler's config, and what the network predicts."""

    @abstractmethod
    def cond_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Sizes of what ``encode_text`` gives for one prompt, by name; ``tokens``: the tokenizer's own length."""

    @staticmethod
    @abstractmethod
    def half_forward(network: nn.Module, **inputs: Any) -> Tensor:
        """The first half of ``network`` on ``_half_inputs``: its bottleneck (B, F, h, w)."""

    @abstractmethod
    def _half_inputs(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        """Arguments of ``half_forward`` in the network's storage dtype."""

    def _from_vae(self, latents: Tensor) -> Tensor:
        """The VAE's latents scaled as the network reads them."""
        return latents * self.vae.config.scaling_factor

    def _to_vae(self, latents: Tensor) -> Tensor:
        """The inverse of ``_from_vae``."""
        return latents / self.vae.config.scaling_factor

    @classmethod
    def load(
        cls,
        source: str,
        sharing: Sharing,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        image_size: int | None = None,
        to_be_sharded: bool = False,
        guidance_embedding: int = 0,
    ) -> Self:
        """Load a pipeline folder or hub id; ``UserError`` names what is missing.

        ``image_size`` (pixels) is for networks that do not fix the size of their latents, ``guidance_embedding`` the
        width of an input for guidance that it gets. ``to_be_sharded``: the
        network and its copies stay on the host until sharding takes each block to ``device``. If the file holds
        ``dtype``, it is memory-mapped and the processes of a node share it.
        """
        options = {"revision": revision} if revision else {}
        try:
            scheduler = read_json(source, SCHEDULER, revision)
            network = cls.network_class.from_pretrained(
                source, subfolder=cls.network_folder, torch_dtype=dtype, **options
            )
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(
                f"backbone.path={source}: no {cls.pipeline} can be read there (needs {cls.parts}): "
                f"{str(error).splitlines()[0]}"
            ) from error
        # One that is to be sharded shares the file's memory with the other processes of a node
        if cls.channels_last and sharing.kind == "lora" and not to_be_sharded:
            network = network.to(device, memory_format=torch.channels_last)
        network = network.to("cpu" if to_be_sharded else device)
        where = {"source": source, "revision": revision, "device": device}
        loaded = cls(network, scheduler, sharing, **where, guidance_embedding=guidance_embedding)
        loaded.roles.aliased = to_be_sharded
        return loaded

    @classmethod
    def from_architecture(
        cls,
        architecture: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        sharing: Sharing,
        *,
        vae: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        guidance_embedding: int = 0,
    ) -> Self:
        """A network without weights (call it under ``torch.device("meta")`` to count parameters), and such a VAE.

        ``image_size`` as in ``load``.
        """
        built = cls(cls.network_class(**architecture), scheduler, sharing, guidance_embedding=guidance_embedding)
        if vae is not None:
            built.vae = cls.vae_class(**vae).eval().requires_grad_(False)
            if image_size is not None:
                built._resize(image_size, built.vae.config, scheduler)
        return built

    def view(self, owner: str, sharing: Sharing) -> Self:
        """This backbone as ``owner`` sees it, which shares it with others.

        Base, VAE and text encoders are everybody's; roles, except for the teacher, and counted evaluations are its own.
        """
        seen = copy.copy(self)
        seen.roles, seen.evaluations = OwnRoles(self.roles, owner, sharing), Counter()
        return seen

    def add_role(
        self, role: str, like: str | None = None, *, trainable: bool, average: bool = False, seed: int = 0
    ) -> None:
        self.roles.add(role, like, trainable=trainable, average=average, seed=seed)

    def merge_parent(self, factors: Mapping[str, Tensor]) -> None:
        """Make the parent's student the base, before there are roles; ``factors`` as ``core.backbones.adapters``."""
        merge_into(self.roles.base, factors)
        self.merged_parent = factors

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        return self.roles.parameters(role)

    @staticmethod
    @abstractmethod
    def blocks(network: nn.Module) -> list[nn.Module]:
        """The blocks of one network: what is sharded, compiled and recomputed one at a time."""

    def networks(self) -> list[nn.Module]:
        return self.roles.modules()

    def shard_units(self) -> list[nn.Module]:
        return [block for network in self.networks() for block in self.blocks(network)]

    def compile_blocks(self, backend: str | None) -> None:
        def compile_network(network: nn.Module) -> None:
            for block in self.blocks(network):
                compile_block(block, backend)

        for network in self.networks():
            compile_network(network)
        self.roles.when_merged(compile_network)

    def lay_out_for_sampling(self) -> None:
        if self.channels_last:
            for network in self.networks():
                network.to(memory_format=torch.channels_last)

    def keep_adapters_apart(self) -> None:
        self.roles.merging = False

    def merge_again(self, role: str | None = None) -> None:
        self.roles.merge_again(role)

    @property
    def merged_bytes(self) -> int:
        return merged_bytes(self.roles.base) if self.roles.merges else 0

    def stepping(self, role: str | None) -> AbstractContextManager:
        return self.roles.stepping(role)

    def network_features(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(role) as network:
            return network.half_forward(**self._half_inputs(network, x_t, t, cond))

    def enable_activation_checkpointing(self) -> None:
        for module in self.roles.modules():
            module.enable_gradient_checkpointing(self.roles.checkpointing())
            module.train()  # diffusers checkpoints in train mode only; these networks have no dropout
        self.checkpoints_activations = True

    def training_pixels(self, latents: Tensor) -> Tensor:
        if self.checkpoints_activations and not self.vae.is_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing(recomputed)
        return super().training_pixels(latents)

    # Pixels and text.
    def release_text_encoders(self) -> None:
        for name in self.text_encoders:
            self.__dict__.pop(name, None)  # a cached property: loaded again when it is asked for

    def _component(self, kind: Any, name: str, *, may_be_bf16: bool = False) -> nn.Module:
        """A frozen part of the pipeline, in fp32; in bf16 if it is stored so and the caller allows it."""
        if (held := self._loaded.get(name)) is not None:
            return held
        assert self.source is not None, "a backbone built from its config alone has no VAE or text encoder"
        options = {"revision": self.revision} if self.revision else {}
        try:
            config = read_json(self.source, f"{name}/config.json", self.revision) if may_be_bf16 else {}
            stored = config.get("dtype", config.get("torch_dtype"))
            dtype = torch.bfloat16 if stored == "bfloat16" else torch.float32
            module = kind.from_pretrained(self.source, subfolder=name, torch_dtype=dtype, **options)
        except OSError as error:
            raise UserError(f"{self.source}/{name}: cannot be loaded: {str(error).splitlines()[0]}") from error
        self._loaded[name] = module.to(self.device).eval().requires_grad_(False)
        return module

    def _tokenizer(self, kind: Any, name: str) -> PreTrainedTokenizerBase:
        assert self.source is not None
        try:
            return kind.from_pretrained(self.source, subfolder=name, revision=self.revision or "main")
        except OSError as error:
            raise UserError(f"{self.source}/{name}: cannot be loaded: {str(error).splitlines()[0]}") from error

    def _tokens(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids, and 1 where a token is, both (B, length), padded and cut; default: the tokenizer's length."""
        length = length or tokenizer.model_max_length
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)

    @cached_property
    def vae_scale(self) -> int:
        """Pixels of an image for each position of its latent."""
        if self.source is None:  # built from its config alone: the released models
            return 8
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def pixels_of_a_position(self) -> int:
        """Pixels of a side of what one position of a latent shows."""
        return self.image_side // self.latent_shape[1]

    @property
    def image_side(self) -> int:
        """Pixels of a side of the images that are generated."""
        return self.latent_shape[1] * self.vae_scale

    def call_options(self) -> dict[str, Any]:
        """Arguments of diffusers' pipeline, beside prompt, steps and guidance, for what this backbone generates."""
        return {"height": self.image_side, "width": self.image_side}

    @cached_property
    def vae(self) -> nn.Module:
        """The VAE in channels last: a quarter faster on a CPU, and what tensor cores want."""
        return self._component(self.vae_class, "vae").to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self._from_vae(self.vae.encode(pixels).latent_dist.mode())

    def pixels(self, latents: Tensor) -> Tensor:
        return self.vae.decode(self._to_vae(latents.to(self.device, non_blocking=True).float())).sample


class TransformerBackbone(PipelineBackbone):
    """A transformer whose tokens are patches of the latent, in one list of blocks."""

    network_folder = "transformer"

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        size = self.latent_shape[1] // self.roles.base.config.patch_size
        return self.roles.base.inner_dim, size, size

    @staticmethod
    def blocks(network: nn.Module) -> list[nn.Module]:
        return [*network.transformer_blocks]


def as_map(network: nn.Module, tokens: Tensor, x_t: Tensor) -> Tensor:
    """Tokens (B, h w, F) of the patches of ``x_t`` as (B, F, h, w)."""
    patch = network.config.patch_size
    return tokens.mT.unflatten(2, (x_t.shape[2] // patch, x_t.shape[3] // patch))


def call_block(network: nn.Module, block: nn.Module, *inputs: Any) -> Any:
    """A block of a diffusers transformer as its own forward calls it, activation checkpointing included."""
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return network._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def dtype_of(network: nn.Module) -> torch.dtype:
    """The network's storage dtype; diffusers' own property walks over all modules at every call."""
    return next(network.parameters()).dtype


def cast(value: Tensor, network: nn.Module) -> Tensor:
    """``value`` in the network's storage dtype (autocast, when on, decides the compute dtype)."""
    return value.to(dtype_of(network))


def read_json(source: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a pipeline folder or of a hub id."""
    if Path(source).is_dir():
        return json.loads((Path(source) / name).read_text())
    from huggingface_hub import hf_hub_download  # only hub ids need the hub

    return json.loads(Path(hf_hub_download(source, name, revision=revision)).read_text())
