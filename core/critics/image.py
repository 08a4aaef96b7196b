"""Discriminators on a frozen network's features of decoded images (the FLUX.2 recipe's GAN on DINO).

The network is none that judges: ``dino`` is a DINO or DINOv2 that the user gives, ``effnet_lite1`` the embedded
ImageNet network beside the judges' EfficientNet-Lite0.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.losses.files import NEEDS_DINO
from core.losses.imagenet import channels_last, efficientnet_lite, normalised, on_meta
from core.schema import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EffnetFeatures(nn.Module):
    """The last three stages of EfficientNet-Lite1: a 64-pixel image gives maps of 8, 4 and 2 positions a side."""

    def __init__(self) -> None:
        super().__init__()
        self.network = efficientnet_lite(1)[0]
        self.channels = [stage["num_chs"] for stage in self.network.feature_info[-3:]]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        images = channels_last(normalised((pixels.float() + 1) * 127.5))
        return self.network.forward_intermediates(images, indices=3, intermediates_only=True)


class DinoFeatures(nn.Module):
    """Patch tokens after each third of a DINO or DINOv2 in transformers' format, as maps.

    On the meta device the architecture alone: DINOv2-B where there is no folder.

    Raises: UserError: no folder, or another kind of network.
    """

    def __init__(self, path: str | None) -> None:
        super().__init__()
        self.network = _dino(path).eval().requires_grad_(False)
        config = self.network.config
        if config.model_type not in ("vit", "dinov2", "dinov2_with_registers"):
            raise UserError(
                f"method.dino_path={path} is a {config.model_type}; allowed: vit (DINO), dinov2, dinov2_with_registers"
            )
        self.patch = config.patch_size
        self.layers = [round(config.num_hidden_layers * part / 3) for part in (1, 2, 3)]
        self.channels = [config.hidden_size] * len(self.layers)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        images = ((pixels.float() + 1) / 2 - self.mean) / self.std
        side = max(round(images.shape[-1] / self.patch), 1)
        images = F.interpolate(images, size=side * self.patch, mode="bicubic", antialias=True, align_corners=False)
        states = self.network(images, output_hidden_states=True, **self._interpolation()).hidden_states
        maps = (states[layer][:, -side * side :] for layer in self.layers)  # class and register tokens come first
        return [tokens.mT.unflatten(2, (side, side)) for tokens in maps]

    def _interpolation(self) -> dict[str, bool]:
        """ViT takes its own image size unless told; DINOv2 always adapts its positions."""
        return {"interpolate_pos_encoding": True} if self.network.config.model_type == "vit" else {}


def _dino(path: str | None) -> nn.Module:
    """A folder's network; without its weights on the meta device, where none is needed."""
    from transformers import AutoConfig, AutoModel, Dinov2Config

    if path is None:
        if on_meta():
            return AutoModel.from_config(Dinov2Config(image_size=518))  # else transformers' defaults are DINOv2-B's
        raise UserError(NEEDS_DINO)
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"method.dino_path={path}: no config.json there; give a folder in transformers' format")
    if on_meta():
        return AutoModel.from_config(AutoConfig.from_pretrained(str(folder)))
    return AutoModel.from_pretrained(str(folder))


class ImageCritic(nn.ModuleList):
    """Maps (B, C_i, h_i, w_i) -> logits (B, sum h_i w_i): a small head on each, every position is judged."""

    def __init__(self, channels: list[int], width: int = 64) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(count, width, 1), nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 1, 1))
            for count in channels
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        dtype = self[0][0].weight.dtype  # may be bf16
        return torch.cat([head(found.to(dtype)).flatten(1) for head, found in zip(self, maps, strict=True)], dim=1)
