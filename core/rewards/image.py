"""Reward models of clean pictures: networks of CLIP's kind, whose scores are exact through transformers and open_clip.

Pictures are resized on tensors, so that a score has a gradient; PIL, which the releases resize with, rounds to 8 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.backbones.base import Backbone
from core.config import UserError
from core.rewards.base import Prompts, Reward
from core.rewards.registry import register_reward

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, LAION's too
HPS_ARCHITECTURE = "ViT-H-14"
MOST_TEXTS = 4096


class PictureReward(Reward):
    """A network that embeds pictures and texts; the text of a caption is embedded once."""

    space = "image"

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = network.to(device).eval().requires_grad_(False), device
        self._texts: dict[str, Tensor] = {}

    def networks(self) -> dict[str, nn.Module]:
        return {"reward_model": self.network}

    @abstractmethod
    def images(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, D) of pixels (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D)."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of captions, most of which were met before."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            if len(self._texts) + len(new) > MOST_TEXTS:
                self._texts, new = {}, list(dict.fromkeys(texts))
            with torch.no_grad():
                self._texts.update(zip(new, self.embed(new), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def scale(self) -> Tensor | float:
        """The factor of the cosine."""
        return 1.0

    def score(self, x: Tensor, prompts: Prompts, t: Tensor) -> Tensor:
        images = self.images(x.to(self.device))
        cosine = (images * self.texts(prompts.texts)).sum(1)
        return (self.scale() * cosine).float().to(x.device)


class ClipReward(PictureReward):
    """CLIP in transformers' format; ``scaled``: times its logit scale, as PickScore is stated."""

    def __init__(self, network: nn.Module, tokenizer: Callable[..., Any], device: torch.device, scaled: bool) -> None:
        super().__init__(network, device)
        self.tokenizer, self.scaled = tokenizer, scaled

    def images(self, pixels: Tensor) -> Tensor:
        x = as_clip_sees(pixels, self.network.config.vision_config.image_size)
        pooled = self.network.vision_model(pixel_values=x).pooler_output
        return F.normalize(self.network.visual_projection(pooled), dim=-1)

    def embed(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        pooled = self.network.text_model(**tokens.to(self.device)).pooler_output
        return F.normalize(self.network.text_projection(pooled), dim=-1)

    def scale(self) -> Tensor | float:
        return self.network.logit_scale.exp() if self.scaled else 1.0


class OpenClipReward(PictureReward):
    """A model of open_clip; its score is the cosine."""

    def __init__(self, network: nn.Module, tokenizer: Callable[..., Tensor], device: torch.device, side: int) -> None:
        super().__init__(network, device)
        self.tokenizer, self.side = tokenizer, side

    def images(self, pixels: Tensor) -> Tensor:
        return self.network.encode_image(as_clip_sees(pixels, self.side), normalize=True)

    def embed(self, texts: Sequence[str]) -> Tensor:
        return self.network.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True)


class Aesthetics(Reward):
    """LAION's improved aesthetic predictor: five linear layers on CLIP ViT-L/14's unit image vector; no text."""

    space = "image"

    def __init__(self, clip: ClipReward, head: nn.Module) -> None:
        self.clip, self.head = clip, head.to(clip.device).eval().requires_grad_(False)

    def networks(self) -> dict[str, nn.Module]:
        return {**self.clip.networks(), "reward_head": self.head}

    def score(self, x: Tensor, prompts: Prompts, t: Tensor) -> Tensor:
        return self.head(self.clip.images(x.to(self.clip.device)))[:, 0].float().to(x.device)


def as_clip_sees(pixels: Tensor, side: int) -> Tensor:
    """Pixels in [-1, 1] of the size and with the statistics that CLIP reads; a square picture loses no border."""
    short = min(pixels.shape[-2:])
    size = [round(length * side / short) for length in pixels.shape[-2:]]
    x = F.interpolate((pixels.float() + 1) / 2, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((length - side) // 2 for length in x.shape[-2:])
    x = x[..., top : top + side, left : left + side].clamp(0, 1)
    mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def aesthetic_head(width: int = 768) -> nn.Module:
    """The predictor's layers under the names of its release; its dropout does nothing when it scores."""
    sizes = (width, 1024, 128, 64, 16)
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.Dropout(0.0)]
    layers[-1:] = [nn.Linear(16, 1)]
    return nn.Sequential(*layers)


def _load_clip(folder: Path, backbone: Backbone, *, scaled: bool) -> ClipReward:
    from transformers import AutoTokenizer, CLIPModel

    try:
        network, loading = CLIPModel.from_pretrained(str(folder), use_safetensors=True, output_loading_info=True)
        if loading["missing_keys"] or loading["mismatched_keys"]:
            raise ValueError("it does not hold the weights of a CLIP")
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        refuse(folder, error, "a CLIP in transformers' format with model.safetensors and a tokenizer")
    return ClipReward(network, tokenizer, backbone_device(backbone), scaled)


def _load_hpsv2(folder: Path, backbone: Backbone) -> OpenClipReward:
    import open_clip

    network = open_clip.create_model(HPS_ARCHITECTURE, pretrained=None)
    fill(network, folder / "hpsv2.safetensors", "")
    return OpenClipReward(network, open_clip.get_tokenizer(HPS_ARCHITECTURE), backbone_device(backbone), 224)


def _load_aesthetics(folder: Path, backbone: Backbone) -> Aesthetics:
    clip = _load_clip(folder, backbone, scaled=False)
    head = aesthetic_head(clip.network.config.projection_dim)
    fill(head, folder / "aesthetics.safetensors", "layers.")
    return Aesthetics(clip, head)


def fill(network: nn.Module, file: Path, prefix: str) -> None:
    """Load a network's state, whose names begin with ``prefix``, from safetensors; UserError for anything else."""
    try:
        state = {name.removeprefix(prefix): value for name, value in load_file(file).items()}
        network.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        refuse(file, error, f"the {len(network.state_dict())} tensors of this network as safetensors")


def refuse(place: Path, error: Exception, wanted: str) -> NoReturn:
    """One line for weights that are not what a reward model reads."""
    raise UserError(f"method.rl.reward_path: {place} is not {wanted}: {str(error).strip().splitlines()[0]}") from error


def backbone_device(backbone: Backbone) -> torch.device:
    """The device on which a reward model scores what this backbone draws."""
    return torch.device(getattr(backbone, "device", "cpu"))


def _foreign(name: str, network: str, package: str) -> Callable[[Path, Backbone], Reward]:
    def load(folder: Path, backbone: Backbone) -> Reward:
        raise UserError(
            f"method.rl.reward={name}: its network ({network}) is in neither transformers nor open_clip, and {package} "
            "cannot be installed beside them; it is not approximated here"
        )

    return load


def register_image_rewards() -> None:
    """Make the reward models of this file selectable."""
    from core.rewards.known import KNOWN_REWARDS

    loads = {
        "clip": lambda folder, backbone: _load_clip(folder, backbone, scaled=False),
        "pickscore": lambda folder, backbone: _load_clip(folder, backbone, scaled=True),
        "hpsv2": _load_hpsv2,
        "aesthetics": _load_aesthetics,
        "image_reward": _foreign("image_reward", "BLIP with cross-attended text", "the package image-reward"),
        "mps": _foreign("mps", "CLIP-H with a cross-attention head", "its release"),
    }
    for name, load in loads.items():
        register_reward(KNOWN_REWARDS[name], load)
