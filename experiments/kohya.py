"""A student's LoRA under the names of Kohya's scripts, which ComfyUI and the web UIs read too.

UNets keep diffusers' names of their modules, by diffusers' own converter. FLUX.2 has the names of its authors' code,
where q, k and v are one layer: their adapters become one of three times the rank, which diffusers takes apart again.
Each layer's ``alpha`` says by how much the product of its factors counts: alpha / rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, Self

import diffusers
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from torch import Tensor

from core.backbones.pipeline import PipelineBackbone
from core.backbones.roles import Sharing
from core.config import UserError

_PREFIX = "lora_unet_"  # of every denoising network's layers, transformers included
_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")
# FLUX.2's modules: diffusers' names and the authors'
_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
_WITHIN = {
    "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj",
    "ff.linear_in": "img_mlp_0", "ff.linear_out": "img_mlp_2",
    "ff_context.linear_in": "txt_mlp_0", "ff_context.linear_out": "txt_mlp_2",
    "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2",
}  # fmt: skip
_OUTSIDE = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer_linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in_out_layer",
}  # fmt: skip
_FUSED = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


class Factors(NamedTuple):
    """A layer's factors, ``down`` (rank, in) and ``up`` (out, rank); of a convolution with its window."""

    down: Tensor
    up: Tensor

    @classmethod
    def joined(cls, parts: list[Self | None]) -> Self:
        """One adapter for layers that share their input and whose outputs follow one another; None adds nothing."""
        some = next(part for part in parts if part is not None)
        none = cls(torch.zeros_like(some.down), torch.zeros_like(some.up))
        filled = [none if part is None else part for part in parts]
        return cls(torch.cat([part.down for part in filled]), torch.block_diag(*(part.up for part in filled)))


def kohya_state(backbone: PipelineBackbone, parameters: Mapping[str, Tensor], sharing: Sharing) -> dict[str, Tensor]:
    """Factors ``...lora_A.weight`` and ``...lora_B.weight`` of a role as a file's tensors in Kohya's keys.

    Raises:
        UserError: diffusers' reader would leave layers out.
    """
    factors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
    if backbone.network_folder == "unet":
        state = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in factors.items()})
    else:
        state = _flux2_state(factors)
    scale = sharing.alpha / sharing.rank
    for key in [key for key in state if key.endswith(".lora_down.weight")]:
        state[key.replace(".lora_down.weight", ".alpha")] = torch.tensor(scale * len(state[key]))
    _check_read_back(backbone, state, factors)
    return state


def _flux2_state(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, layer in _flux2_layers(factors).items():
        state[f"{_PREFIX}{name}.lora_down.weight"], state[f"{_PREFIX}{name}.lora_up.weight"] = layer
    return state


def _flux2_layers(factors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The adapters by the authors' names; those of modules without such a name are left out."""
    found, parts = {}, {}
    for key in factors:
        module, is_down, _ = key.partition(".lora_A.")
        if not is_down:
            continue
        layer = Factors(factors[key], factors[f"{module}.lora_B.weight"])
        block = _BLOCK.fullmatch(module)
        if block is None:
            found[_OUTSIDE.get(module)] = layer
            continue
        prefix = f"{_BLOCKS[block[1]]}_{block[2]}"
        if block[3] in _WITHIN:
            found[f"{prefix}_{_WITHIN[block[3]]}"] = layer
        else:
            parts[prefix, block[3]] = layer
    found.pop(None, None)
    return found | _joined(parts)


def _joined(parts: Mapping[tuple[str, str], Factors]) -> dict[str, Factors]:
    """One adapter for q, k and v of each block and stream, if any of the three has one."""
    joined = {}
    for prefix in dict.fromkeys(prefix for prefix, _ in parts):
        for fused, names in _FUSED.items():
            layers = [parts.get((prefix, name)) for name in names]
            if any(layers):
                joined[f"{prefix}_{fused}"] = Factors.joined(layers)
    return joined


def _check_read_back(backbone: PipelineBackbone, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """UserError unless diffusers' own reader finds every layer in ``state``."""
    read = getattr(diffusers, backbone.pipeline).lora_state_dict(dict(state))
    read = read[0] if isinstance(read, tuple) else read  # of UNets with the alphas
    found = {key.removeprefix(f"{backbone.network_folder}."): value for key, value in read.items()}
    if backbone.network_folder == "unet":
        found = convert_unet_state_dict_to_peft(found)
    lost = sorted(wanted.keys() - found.keys())
    if lost:
        layer = lost[0].partition(".lora_")[0]
        raise UserError(
            f"--format kohya: diffusers' reader knows no such key for {layer} (one of {len(lost) // 2} layers of "
            "backbone.lora_targets); allowed: diffusers"
        )
