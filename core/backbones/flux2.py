"""FLUX.2: a transformer with rectified flow on patchified, batch-normalised latents of its own VAE.

``dev`` is guidance-distilled: guidance enters as an embedding and costs no second pass. ``klein`` (and the embedded
miniature) has none and takes classifier-free guidance. The pipeline's text encoder is a language model, of which the
states after a quarter, a half and three quarters of the layers are the conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from transformers import AutoProcessor, Mistral3ForConditionalGeneration, Qwen2TokenizerFast, Qwen3ForCausalLM

from core.backbones.base import Cond
from core.backbones.pipeline import SCHEDULER, PipelineBackbone, call_block, cast, read_json
from core.backbones.roles import Sharing, keyed_init
from core.config import UserError
from core.diffusion.process import FlowProcess, Process

MAX_TOKENS = 512  # as diffusers' pipelines
TRAINING_STEPS = 50  # the time shift depends on the number of steps; random times are drawn as for this many
# By pipeline: text encoder, tokenizer, and diffusers' function from prompts to the stacked states
ENCODERS: dict[str, tuple[Any, Any, Callable[..., Tensor]]] = {
    "Flux2Pipeline": (
        Mistral3ForConditionalGeneration, AutoProcessor, Flux2Pipeline._get_mistral_3_small_prompt_embeds
    ),
    "Flux2KleinPipeline": (Qwen3ForCausalLM, Qwen2TokenizerFast, Flux2KleinPipeline._get_qwen3_prompt_embeds),
}  # fmt: skip


class Flux2Backbone(PipelineBackbone):
    """See ``PipelineBackbone``. Latents (B, 4 C, H/2, W/2) of a VAE's (B, C, H, W). Conditioning: ``text`` (B, L, D)
    and, where guidance is embedded, ``guidance`` (B,)."""

    pipeline = "Flux2KleinPipeline"
    network_folder, network_class, vae_class = "transformer", Flux2Transformer2DModel, AutoencoderKLFlux2
    parts = "transformer/, vae/, text_encoder/, tokenizer/, scheduler/, model_index.json"
    side: int = 64  # of the latents: 1024 pixels
    guidance_layers = ("guidance_embedder.linear_1", "guidance_embedder.linear_2")
    embedded_guidance: float = 4.0  # w of calls without one, where guidance is an embedding

    @classmethod
    def load(cls, source: str, sharing: Sharing, *, image_size: int | None = None, **options: Any) -> Self:
        """Load a folder or hub id as any pipeline; ``image_size`` (pixels) sets the size of the latents."""
        built = super().load(source, sharing, **options)
        revision = options.get("revision")
        try:
            name = read_json(source, "model_index.json", revision)["_class_name"]
            vae = read_json(source, "vae/config.json", revision)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"backbone.path={source}: no FLUX.2 pipeline can be read there (needs {cls.parts})"
            ) from error
        if name not in ENCODERS:
            raise UserError(f"backbone.path={source} is a {name}; allowed: {', '.join(ENCODERS)}")
        built.pipeline = name
        built._resize(image_size or vae["sample_size"], vae, read_json(source, SCHEDULER, revision))
        return built

    def _resize(self, image_size: int, vae: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        """Set the size of the latents, and the process again: its time shift depends on that size."""
        self.side = image_size // (2 ** (len(vae["block_out_channels"]) - 1) * 2)
        self.latent_shape = self._latent_shape(self.roles.base)
        self.process, self.prediction = self._process(scheduler)

    def _latent_shape(self, network: nn.Module) -> tuple[int, int, int]:
        return network.config.in_channels, self.side, self.side

    def _process(self, scheduler: Mapping[str, Any]) -> tuple[Process, str]:
        if not scheduler.get("use_dynamic_shifting", False):
            return FlowProcess(scheduler.get("shift", 1.0)), "flow"

        def shift(num_steps: int) -> float:
            return math.exp(compute_empirical_mu(self.side**2, num_steps))

        return FlowProcess(shift(TRAINING_STEPS), shift), "flow"

    # The VAE's latents in patches of 2x2, each channel of which the VAE's running statistics normalise.
    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        scale = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        return norm.running_mean.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)

    def _from_vae(self, latents: Tensor) -> Tensor:
        mean, scale = self._statistics()
        return (Flux2Pipeline._patchify_latents(latents) - mean) / scale

    def _to_vae(self, latents: Tensor) -> Tensor:
        mean, scale = self._statistics()
        return Flux2Pipeline._unpatchify_latents(latents * scale + mean)

    @property
    def student_guidance(self) -> float:
        """The guidance to sample a student with: the one that was embedded in its training, else 1 (none)."""
        return self.embedded_guidance if self.has_embedded_guidance else 1.0

    @property
    def has_embedded_guidance(self) -> bool:
        """Whether guidance is an input of the network instead of a second pass."""
        return self.roles.base.config.guidance_embeds and not self.has_guidance_layer

    @staticmethod
    def add_guidance_layer(network: Flux2Transformer2DModel, width: int) -> None:
        """The embedding that dev has, of which klein's transformer has none; its second layer is zero."""
        embedding, channels = network.time_guidance_embed, network.config.timestep_guidance_channels
        if embedding.guidance_embedder is not None or width != channels:
            allowed = 0 if embedding.guidance_embedder is not None else f"0 and {channels}"
            raise UserError(f"backbone.guidance_embedding={width} is not for this network; allowed: {allowed}")
        weight = embedding.timestep_embedder.linear_1.weight
        with keyed_init("guidance embedder"):
            layer = TimestepEmbedding(channels, weight.shape[0], sample_proj_bias=False)
        nn.init.zeros_(layer.linear_2.weight)
        embedding.guidance_embedder = layer.to(weight.device, weight.dtype)
        network.register_to_config(guidance_embeds=True)

    def takes_guidance(self, role: str) -> bool:
        return self.has_embedded_guidance or super().takes_guidance(role)

    def _inputs(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Tensor | None]:
        """The network's arguments: tokens, their positions (time, row, column, index in the text), time, guidance."""
        text, (height, width) = cond.tensors["text"], x_t.shape[2:]
        device = x_t.device
        first, rows, columns, words = (torch.arange(n, device=device) for n in (1, height, width, text.shape[1]))
        guidance = cond.tensors.get("guidance")
        if guidance is None and self.has_embedded_guidance:
            guidance = torch.full((len(x_t),), self.embedded_guidance, device=device)
        return {
            "hidden_states": cast(x_t.flatten(2).mT, net),
            "encoder_hidden_states": cast(text, net),
            "timestep": t.float() / 1000,
            "guidance": guidance,
            "img_ids": torch.cartesian_prod(first, rows, columns, first),
            "txt_ids": torch.cartesian_prod(first, first, first, words),
        }

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(role) as net:
            tokens = net(**self._inputs(net, x_t, t, cond), return_dict=False)[0]
            return tokens.mT.unflatten(2, x_t.shape[2:])

    def cond_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (min(tokens, MAX_TOKENS), self.roles.base.config.joint_attention_dim)}

    @staticmethod
    def half_forward(
        network: Flux2Transformer2DModel,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        """The image's tokens after half of the blocks, double and single ones counted together, as a map."""
        dtype = hidden_states.dtype
        scale = None if guidance is None else guidance.to(dtype) * 1000
        embedding = network.time_guidance_embed(timestep.to(dtype) * 1000, scale)
        modulations = network.double_stream_modulation_img(embedding), network.double_stream_modulation_txt(embedding)
        image, text = network.x_embedder(hidden_states), network.context_embedder(encoder_hidden_states)
        pairs = zip(network.pos_embed(txt_ids), network.pos_embed(img_ids), strict=True)
        rotary = tuple(torch.cat(pair) for pair in pairs)
        half = (len(network.transformer_blocks) + len(network.single_transformer_blocks)) // 2
        for block in network.transformer_blocks[:half]:
            text, image = call_block(network, block, image, text, *modulations, rotary)
        both = torch.cat([text, image], dim=1)
        for block in network.single_transformer_blocks[: max(half - len(network.transformer_blocks), 0)]:
            both = call_block(network, block, both, None, network.single_stream_modulation(embedding), rotary)
        side = math.isqrt(img_ids.shape[0])
        return both[:, text.shape[1] :].mT.unflatten(2, (side, side))

    def _half_inputs(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        return self._inputs(network, x_t, t, cond)

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        return self.roles.base.inner_dim, self.side, self.side

    @staticmethod
    def blocks(network: nn.Module) -> list[nn.Module]:
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    @cached_property
    def text_encoder(self) -> nn.Module:
        """The language model; in bf16 if it is stored so, as the released ones are (24B parameters in dev)."""
        return self._component(ENCODERS[self.pipeline][0], "text_encoder", may_be_bf16=True)

    @cached_property
    def tokenizer(self) -> Any:
        return self._tokenizer(ENCODERS[self.pipeline][1], "tokenizer")

    @property
    def text_layers(self) -> tuple[int, int, int]:
        """After 1/4, 1/2 and 3/4 of the encoder's layers: 10, 20, 30 of Mistral's 40, 9, 18, 27 of Qwen3's 36."""
        config = self.text_encoder.config
        depth = getattr(config, "text_config", config).num_hidden_layers
        return depth // 4, depth // 2, depth * 3 // 4

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that are read."""
        return min(getattr(self.tokenizer, "tokenizer", self.tokenizer).model_max_length, MAX_TOKENS)

    def call_options(self) -> dict[str, Any]:
        text = {"text_encoder_out_layers": self.text_layers, "max_sequence_length": self.max_tokens}
        return super().call_options() | text

    @property
    def image_side(self) -> int:
        return super().image_side * 2  # a place of the latents is a patch

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """Encode prompts as the encoder's states after ``text_layers``, beside each other."""
        states = ENCODERS[self.pipeline][2](
            self.text_encoder,
            self.tokenizer,
            list(prompts),
            max_sequence_length=self.max_tokens,
            hidden_states_layers=list(self.text_layers),
        )
        return Cond({"text": states.float()})
