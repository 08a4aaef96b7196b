"""Pipelines as their configuration files describe them, without their weights. Torch-free."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from core.config import BackboneConfig, locate

FILE = Path(__file__).parent / "architectures.yaml"
NETWORKS = ("unet", "transformer")  # folders of a pipeline


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """Published pipelines by hub id: ``network``, ``scheduler``, ``vae``, ``tokens`` (that its tokenizer pads to)."""
    return yaml.safe_load(FILE.read_text())


def image_sizes(backbone: BackboneConfig) -> tuple[int | None, int]:
    """The pixels of a side that a pipeline draws, None: any multiple of the second number; (None, 1): unknown."""
    parts = architectures().get(backbone.path) or _described(locate(backbone.path))
    if parts is None:
        return None, 1
    scale = 2 ** (len(parts["vae"].get("block_out_channels", [0] * 4)) - 1)
    side = parts["network"].get("sample_size")
    if isinstance(side, int):
        return side * scale, scale
    return None, scale * 2  # FLUX.2: a place of its latents is a patch of 2 x 2


def _described(folder: Path) -> dict[str, Any] | None:
    """The network and the VAE of a pipeline's folder; None where they cannot be read, which loading will tell."""
    for name in NETWORKS:
        files = {"network": folder / name / "config.json", "vae": folder / "vae" / "config.json"}
        try:
            return {part: json.loads(file.read_text()) for part, file in files.items()}
        except (OSError, ValueError):
            continue
    return None
