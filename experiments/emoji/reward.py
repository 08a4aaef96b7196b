"""The embedded reward model of pictures: built as the CLIP judge is, on another image network, and trained apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.losses.imagenet import normalised
from core.rewards.image import PictureReward
from experiments.emoji.judge import load_emoji_clip


class EmojiReward(PictureReward):
    """The cosine of a picture of 64x64 pixels and its caption."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        network, _, self.tokenize = load_emoji_clip(folder)
        super().__init__(network, device)

    def images(self, pixels: Tensor) -> Tensor:
        return self.network.encode_image(normalised((pixels.float().clamp(-1, 1) + 1) * 127.5), normalize=True)

    def embed(self, texts: Sequence[str]) -> Tensor:
        return self.network.encode_text(self.tokenize(list(texts)).to(self.device), normalize=True)
