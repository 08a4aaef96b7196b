"""Flash-DMD's Pixel-GAN: heads on several levels of a frozen SAM image encoder, which sees decoded images.

SAM is loaded from a folder in transformers' format. Only the layers up to the last one that a head reads are built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from core.backbones.precision import computing_in, recomputed
from core.losses.files import NEEDS_SAM
from core.losses.imagenet import on_meta
from core.schema import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SAM's preprocessing, too
VIT_H = {
    "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120,
    "global_attn_indexes": [7, 15, 23, 31],
}  # fmt: skip
# Channels of a group of a head's normalisations: 32 groups of 256 channels. One of 1 channel and 1 position is constant
GROUP_SIZE = 8


class SamFeatures(nn.Module):
    """Tokens after ``layers`` (from 1) of SAM's image encoder, as maps (B, C, h, w); a token is a patch of 16 pixels.

    Images keep their size, rounded to whole patches: positions are interpolated, windows stay as they are. Computed in
    ``dtype`` (None: as stored), returned as float32. ``recomputes`` says whether a backward pass computes each layer
    again. On the meta device the architecture alone: ViT-H where there is no folder.

    Raises: UserError: no folder, another kind of network, weights that are missing, or too few layers.
    """

    def __init__(
        self,
        path: str | None,
        layers: Sequence[int],
        dtype: torch.dtype | None = None,
        recomputes: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.network = _sam(path, max(layers)).eval().requires_grad_(False)
        config = self.network.config
        self.layers, self.patch, self.dtype, self.recomputes = tuple(layers), config.patch_size, dtype, recomputes
        self.channels = [config.hidden_size] * len(layers)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        images = ((pixels.float() + 1) / 2 - self.mean) / self.std
        side = max(round(images.shape[-1] / self.patch), 1) * self.patch
        if side != images.shape[-1]:
            images = F.interpolate(images, size=side, mode="bicubic", antialias=True, align_corners=False)
        with computing_in(self.dtype, images):
            states = self._states(images)
        return [states[layer].permute(0, 3, 1, 2).float() for layer in self.layers]

    def _states(self, images: Tensor) -> dict[int, Tensor]:
        """Tokens (B, h, w, C) after each layer that is asked for."""
        network, found = self.network, {}
        tokens = network.patch_embed.projection(images).permute(0, 2, 3, 1)
        if network.pos_embed is not None:
            tokens = tokens + self._positions(tokens.shape[1])
        for number, layer in enumerate(network.layers, 1):
            tokens = recomputed(layer, tokens) if self._must_recompute(tokens) else layer(tokens)
            if number in self.layers:
                found[number] = tokens
        return found

    def _must_recompute(self, tokens: Tensor) -> bool:
        return tokens.requires_grad and self.recomputes()

    def _positions(self, side: int) -> Tensor:
        """The embedding of (side, side) positions, (1, side, side, C)."""
        held = self.network.pos_embed
        if side == held.shape[1]:
            return held
        resized = F.interpolate(held.permute(0, 3, 1, 2), size=side, mode="bicubic", antialias=True)
        return resized.permute(0, 2, 3, 1)


class PixelHead(nn.Module):
    """Map (B, C, h, w) -> logit (B, 1): 3 x [conv 4x4 of stride 2, GN, SiLU], [conv 3x3, GN, SiLU], mean, linear.

    A side of one position stays one, so that small maps have the same head.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = [channels, width, width]
        self.halvings = nn.ModuleList(_block(nn.Conv2d(size, width, 4, stride=2, padding=1)) for size in sizes)
        self.last = _block(nn.Conv2d(width, width, 3, padding=1))
        self.linear = nn.Linear(width, 1)

    def forward(self, found: Tensor) -> Tensor:
        for halve in self.halvings:
            if found.shape[-1] == 1:
                found = F.pad(found, (0, 1, 0, 1))
            found = halve(found)
        return self.linear(self.last(found).mean((2, 3)))


class PixelCritic(nn.ModuleList):
    """Maps (B, C_i, h_i, w_i) -> logits (B, number of maps): a head on each level judges the image."""

    def __init__(self, channels: Sequence[int], width: int = 256) -> None:
        super().__init__(PixelHead(count, width) for count in channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        dtype = self[0].linear.weight.dtype  # may be bf16
        return torch.cat([head(found.to(dtype)) for head, found in zip(self, maps, strict=True)], dim=1)


def _block(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(
        convolution, nn.GroupNorm(convolution.out_channels // GROUP_SIZE, convolution.out_channels), nn.SiLU()
    )


def _sam(path: str | None, layers: int) -> nn.Module:
    """The image encoder of a folder with so many layers; on the meta device without its weights."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    if path is None and not on_meta():
        raise UserError(NEEDS_SAM)
    config = SamVisionConfig(**VIT_H) if path is None else _config(Path(path).expanduser())
    if config.num_hidden_layers < layers:
        raise UserError(
            f"method.sam_layers: layer {layers} is not in method.sam_path={path}; allowed: 1 to "
            f"{config.num_hidden_layers}"
        )
    config.num_hidden_layers = layers
    if on_meta():
        return SamVisionEncoder._from_config(config)
    return _with_weights(Path(path).expanduser(), config)


def _config(folder: Path) -> Any:
    """The image encoder's part of a folder's configuration."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"method.sam_path={folder}: no config.json there; give a folder in transformers' format")
    config = AutoConfig.from_pretrained(str(folder))
    if config.model_type not in ("sam", "sam_vision_model"):
        raise UserError(f"method.sam_path={folder} is a {config.model_type}; allowed: sam, sam_vision_model")
    return getattr(config, "vision_config", config)


def _with_weights(folder: Path, config: Any) -> nn.Module:
    """The encoder of a folder's weights, of which none may be missing."""
    from transformers import SamVisionModel

    class Encoder(SamVisionModel):
        _keys_to_ignore_on_load_unexpected = (".",)  # the rest of SAM, told weight by weight otherwise

    try:
        model, told = Encoder.from_pretrained(str(folder), config=config, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"method.sam_path={folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise UserError(f"method.sam_path={folder} lacks {len(missing)} weights of SAM's image encoder: {missing[0]}")
    return model.vision_encoder
