"""Networks of a reference step: plain diffusers UNets whose evaluations are counted, and what they learn from."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers import UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from peft import LoraConfig
from torch import Tensor, nn

from core.critics.latent import LatentCritic


@dataclass(frozen=True)
class Adapters:
    """The student's adapters: their rank, and the module name endings that get one."""

    rank: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """One batch as every step gets it: latents (B, C, H, W), text embeddings (B, L, D), and the empty prompt's."""

    latents: Tensor
    text: Tensor
    null: Tensor


class BottleneckReached(Exception):  # noqa: N818  no error
    """The first half of a UNet is done; its only argument is the bottleneck (B, F, h, w)."""


class CountedUNet:
    """A UNet that counts the samples of its evaluations under the name of its role, half passes apart."""

    def __init__(self, unet: UNet2DConditionModel, role: str, counter: Counter[str]) -> None:
        self.unet, self.role, self.counter = unet, role, counter

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The raw prediction (B, C, H, W)."""
        self.counter[self.role] += len(x_t)
        return self.unet(x_t, t, encoder_hidden_states=text).sample

    def bottleneck(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The output of the middle block (B, F, h, w); what comes after it is not computed."""
        self.counter[f"{self.role}_features"] += len(x_t)
        hook = self.unet.mid_block.register_forward_hook(_stop)
        try:
            self.unet(x_t, t, encoder_hidden_states=text)
        except BottleneckReached as reached:
            return reached.args[0]
        finally:
            hook.remove()
        raise AssertionError("the network has no middle block")

    def with_bottleneck(self, x_t: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and bottleneck of one evaluation."""
        kept: list[Tensor] = []
        hook = self.unet.mid_block.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            return self(x_t, t, text), kept[0]
        finally:
            hook.remove()

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]


def _stop(module: nn.Module, inputs: Any, output: Tensor) -> NoReturn:
    raise BottleneckReached(output)


def load_unet(source: str, device: torch.device) -> UNet2DConditionModel:
    """The teacher of a pipeline's folder, frozen, in fp32."""
    unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", torch_dtype=torch.float32)
    return unet.to(device).eval().requires_grad_(False)


def student_of(teacher: UNet2DConditionModel, adapters: Adapters | None) -> UNet2DConditionModel:
    """A copy of the teacher that trains in full, or only in new adapters (peft's own, never merged)."""
    student = copy.deepcopy(teacher)
    if adapters is None:
        return student.requires_grad_(True)
    student.add_adapter(LoraConfig(r=adapters.rank, lora_alpha=adapters.rank, target_modules=list(adapters.targets)))
    return student


def critic_for(unet: UNet2DConditionModel, latent_size: int) -> LatentCritic:
    """A head on the bottleneck, of our shape."""
    channels = unet.config.block_out_channels
    size = latent_size // 2 ** (len(channels) - 1)
    return LatentCritic((channels[-1], size, size)).to(unet.device)


def x0_of(raw: Tensor, x_t: Tensor, t: Tensor, scheduler: SchedulerMixin, dtype: torch.dtype) -> Tensor:
    """x0 of a raw prediction (eps or v), computed in ``dtype`` and returned in float32."""
    alpha = scheduler.alphas_cumprod.to(x_t.device, dtype)[t].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    raw, x_t = raw.to(dtype), x_t.to(dtype)
    if scheduler.config.prediction_type == "v_prediction":
        return (alpha * x_t - sigma * raw).float()
    return ((x_t - sigma * raw) / alpha).float()


def shared_by_batch(wanted: Sequence[Sequence[int]]) -> list[int]:
    """One number for each batch, where ours has one for each sample: their means, rounded so that the sum stays."""
    found: list[int] = []
    total = 0.0
    for numbers in wanted:
        total += sum(numbers) / len(numbers)
        found.append(round(total) - sum(found))
    return found
