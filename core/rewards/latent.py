"""The Latent Reward Model (LPO, Zhang et al., 2025): the teacher's own encoder half scores noisy latents at their time.

S = exp(tau) cos(V, T). V is a linear map of the spatial means of all stages' outputs, of which the mid block's is
guided, V_u + 7.5 (V - V_u); T is a linear map of the text encoder's output. It shares VAE, text encoder and base with
the student, and holds the two maps alone: LPO trains the half too, here it stays the teacher's.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.backbones.base import TEACHER, Backbone, Cond
from core.config import UserError
from core.rewards.base import Prompts, Reward
from core.rewards.image import refuse
from core.rewards.known import KNOWN_REWARDS

GUIDANCE = 7.5
TIMES = tuple(range(1, 1000, 50))  # 1, 51, ..., 951, of a thousand
WIDTH = 128  # of V and T


class LatentHead(nn.Module):
    """The two linear maps, on standardised inputs, and tau; features (B, F) and texts (B, D) to scores (B,)."""

    def __init__(self, features: int, text: int, width: int = WIDTH) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(features, width, bias=False), nn.Linear(text, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.6592))  # CLIP's beginning, as LPO's [C]
        for name, size in (("features", features), ("texts", text)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def standardise(self, features: Tensor, texts: Tensor) -> None:
        """Set what is subtracted and divided by from features (N, F) and texts (N, D) to be learned from."""
        for name, values in (("features", features), ("texts", texts)):
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(values.std(0).clamp(min=1e-4))

    def forward(self, features: Tensor, texts: Tensor) -> Tensor:
        v = self.visual((features - self.features_mean) / self.features_std)
        t = self.text((texts - self.texts_mean) / self.texts_std)
        return self.log_scale.exp() * F.cosine_similarity(v, t, dim=1)


class LatentReward(Reward):
    """See the module's docstring."""

    space = "latent"

    def __init__(self, backbone: Backbone, head: LatentHead) -> None:
        self.backbone, self.head = backbone, head.to(getattr(backbone, "device", "cpu")).eval().requires_grad_(False)

    def networks(self) -> dict[str, nn.Module]:
        return {"reward_head": self.head}

    def score(self, x: Tensor, prompts: Prompts, t: Tensor) -> Tensor:
        features = latent_features(self.backbone, x, t, prompts.cond, prompts.null)
        return self.head(features, text_features(prompts.cond))


def latent_features(backbone: Backbone, x_t: Tensor, t: Tensor, cond: Cond, null: Cond) -> Tensor:
    """Spatial means of the stages (B, F), the guided one of the bottleneck last; both passes are one batch."""
    both = Cond.cat([cond, null.beside(cond)])
    stages = backbone.stages(TEACHER, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    *outer, (mid, null_mid) = ([half for half in stage.mean((2, 3)).chunk(2)] for stage in stages)
    return torch.cat([*(with_text for with_text, _ in outer), null_mid + GUIDANCE * (mid - null_mid)], dim=1)


def text_features(cond: Cond) -> Tensor:
    """The text encoder's pooled output (B, D), or where a family keeps none the mean of its states [I]."""
    pooled = cond.tensors.get("pooled")
    return (cond.tensors["text"].mean(1) if pooled is None else pooled).float()


def save_head(head: LatentHead, folder: Path) -> None:
    """Write what ``method.rl.reward=lrm`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / "reward.safetensors")


def load_latent_reward(folder: Path, backbone: Backbone) -> LatentReward:
    """Read the head in a folder; UserError where it is none, or of another backbone."""
    file = folder / "reward.safetensors"
    try:
        state = load_file(file)
        width, features = state["visual.weight"].shape
        head = LatentHead(features, state["text.weight"].shape[1], width)
        head.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        refuse(file, error, "the head of a latent reward model")
    expected = sum(stage_widths(backbone))
    if expected != head.visual.in_features:
        raise UserError(
            f"method.rl.reward_path={folder}: it reads {head.visual.in_features} features, and this backbone's half "
            f"has {expected}; train one with its own: {KNOWN_REWARDS['lrm'].source}"
        )
    return LatentReward(backbone, head)


def stage_widths(backbone: Backbone) -> list[int]:
    """Channels of the stages: of a UNet those of its blocks and the mid block's, else the bottleneck's."""
    config = getattr(getattr(getattr(backbone, "roles", None), "base", None), "config", None)
    widths = list(getattr(config, "block_out_channels", ()))
    return [*widths, backbone.feature_shape[0]]
