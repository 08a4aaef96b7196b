"""Distances between decoded images on a frozen network's features, as regression losses of the student.

Each takes pixels (B, 3, H, W) in [-1, 1] and gives a value per sample, float32 (B,). Zhang et al., 2018, Eq. 1: per
stage, channels are scaled to unit length, squared differences weighted, averaged over space; stages are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from core.losses.files import NEEDS_VGG, VGG_FILE
from core.losses.imagenet import channels_last, efficientnet_lite, normalised, on_meta
from core.schema import UserError

Decode = Callable[[Tensor], Tensor]


class PerceptualLoss:
    """``distance`` between decoded latents; the target is decoded without a graph."""

    def __init__(self, distance: nn.Module, decode: Decode) -> None:
        self.distance, self.decode = distance, decode

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            real = self.decode(target)
        return self.distance(self.decode(pred), real)


class EffnetDistance(nn.Module):
    """Distance on the five stages of EfficientNet-Lite1, all weights 1; the judge ``kd_effnet`` has another network."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or efficientnet_lite(1)[0]

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        pairs = zip(self._stages(pred), self._stages(target), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)

    def _stages(self, pixels: Tensor) -> list[Tensor]:
        images = channels_last(normalised((pixels.float() + 1) * 127.5))
        return [unit_length(x) for x in self.network.forward_intermediates(images, intermediates_only=True)]


class LpipsDistance(nn.Module):
    """LPIPS 0.1 with VGG-16: the learned weights come with the package ``lpips``, the network by path.

    Raises: UserError: no file, or another one.
    """

    def __init__(self, path: str | Path | None) -> None:
        super().__init__()
        file = None if on_meta() else _vgg_file(path)
        try:
            import lpips
        except ImportError:
            raise UserError("method.distill_loss=lpips needs the package lpips: pip install 'fewstep[lpips]'") from None
        self.lpips = lpips.LPIPS(pretrained=file is not None, net="vgg", pnet_rand=True, verbose=False)
        if file is not None:
            load_vgg(self.lpips.net, torch.load(file, map_location="cpu", weights_only=True))
        self.requires_grad_(False)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.lpips(pred.float(), target.float()).flatten()


PERCEPTUAL_LOSSES: dict[str, Callable[[str | None], nn.Module]] = {
    "lpips": LpipsDistance,
    "effnet_lite1": lambda path: EffnetDistance(),  # its weights are installed
}


def unit_length(features: Tensor) -> Tensor:
    """(B, C, h, w) scaled to length 1 over the channels; zero stays zero."""
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()


def load_vgg(network: nn.Module, state: dict[str, Tensor]) -> None:
    """torchvision's ``features.N.*`` into the package's ``sliceK.N.*``."""
    names = {name: f"features.{name.partition('.')[2]}" for name in network.state_dict()}
    network.load_state_dict({name: state[source] for name, source in names.items()})


def _vgg_file(path: str | Path | None) -> Path:
    if path is None:
        raise UserError(NEEDS_VGG)
    file = Path(path).expanduser()
    file = file / VGG_FILE if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"method.lpips_path={path}: no file {VGG_FILE} there")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(VGG_FILE.partition("-")[2].partition(".")[0]):
        raise UserError(f"method.lpips_path={path} is not {VGG_FILE}: its sha256 starts with {digest[:8]}")
    return file
