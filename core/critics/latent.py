"""A small convolutional discriminator head on the frozen teacher's bottleneck features (Flash Diffusion, Sec. 4.3)."""

from __future__ import annotations

from torch import Tensor, nn


class LatentCritic(nn.Sequential):
    """Features (B, F, h, w) -> one logit map (B, 1, 1, 1); no sigmoid (Eq. 8 is a least-squares loss on raw outputs).

    For SD1.5 (F=1280, 8x8) this is the release's head of 870,720 parameters: conv3x3 F->c, SiLU, conv4x4 stride 2
    c->2c, SiLU, GroupNorm(4), conv4x4 2c->1. A smaller bottleneck keeps the depth: the middle convolution is 3x3 with
    stride 1, and the last one covers what is left.
    """

    def __init__(self, feature_shape: tuple[int, int, int], channels: int = 64) -> None:
        features, height, width = feature_shape
        assert height == width, "square bottlenecks only"
        halve = height >= 8
        middle = (
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, bias=False)
            if halve
            else nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        )
        last = height // 2 if halve else height
        super().__init__(
            nn.Conv2d(features, channels, 3, padding=1),
            nn.SiLU(),
            middle,
            nn.SiLU(),
            nn.GroupNorm(4, 2 * channels),
            nn.Conv2d(2 * channels, 1, last, bias=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(self[0].weight.dtype))  # which may be bf16
