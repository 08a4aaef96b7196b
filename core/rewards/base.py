"""The contract of reward models: one score for each picture, of pixels or of noisy latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from core.backbones.base import Cond


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch: their texts, and what the backbone's text encoder made of them and of no prompt."""

    texts: Sequence[str]
    cond: Cond
    null: Cond

    def repeat(self, times: int) -> Prompts:
        """Each prompt ``times`` times in a row."""
        rows = torch.arange(len(self.cond)).repeat_interleave(times)
        texts = [text for text in self.texts for _ in range(times)]
        return Prompts(texts, self.cond[rows.to(next(iter(self.cond.tensors.values())).device)], self.null)


class Reward(ABC):
    """A frozen network that scores; larger is better. Its dtype and device are its own."""

    space: ClassVar[str]  # image: pixels in [-1, 1], t is not read | latent: noisy latents at t

    @abstractmethod
    def score(self, x: Tensor, prompts: Prompts, t: Tensor) -> Tensor:
        """A score per picture, float32 (B,) on the device of ``x``, with a graph where ``x`` (B, C, H, W) has one."""

    def networks(self) -> dict[str, nn.Module]:
        """Networks of its own, by name."""
        return {}
