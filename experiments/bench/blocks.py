"""Blocks of FLUX.2's sizes with random weights: seconds, share of the device's peak, and memory. For a GPU.

One double-stream and one single-stream block at 1024 pixels (64x64 image tokens) and 512 tokens of text, in bf16: a
forward alone, as of a teacher, and one with its backward pass, as of a student that trains in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.backbones.roles import keyed_init
from experiments.architectures import architectures
from experiments.bench.timing import peak_tflops, spread, timed
from experiments.memory import GB

HUB_IDS = {"flux2_klein": "black-forest-labs/FLUX.2-klein-base-4B", "flux2_dev": "black-forest-labs/FLUX.2-dev"}


@dataclass(frozen=True)
class Size:
    """The size of a block and of what goes through it: ``heads`` of ``head_dim``, tokens of image and text."""

    heads: int
    head_dim: int
    mlp_ratio: float
    image: int = 64 * 64
    text: int = 512
    batch: int = 1

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def forward_flops(self, kind: str) -> int:
        """Multiplications and additions of a forward pass, from the shapes of its matrices.

        A token of either kind of block: q, k, v and out are 4 w^2 weights, the gated MLP 3 r w^2. Attention of S
        tokens: 2 S^2 w products. Each weight and product is 2 operations.
        """
        assert kind in ("double", "single"), kind
        tokens, width = self.image + self.text, self.width
        weights = 4 * width**2 + 3 * int(self.mlp_ratio * width) * width
        return 2 * self.batch * (tokens * weights + 2 * tokens**2 * width)


def size_of(name: str) -> Size:
    """The published size of a FLUX.2; what its file does not say is diffusers' default."""
    with torch.device("meta"):
        blocks = {"num_layers": 0, "num_single_layers": 0}
        config = Flux2Transformer2DModel(**architectures()[HUB_IDS[name]]["network"] | blocks).config
    return Size(config.num_attention_heads, config.attention_head_dim, config.mlp_ratio)


def block_of(kind: str, size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A block with random weights."""
    made = {"double": Flux2TransformerBlock, "single": Flux2SingleTransformerBlock}[kind]
    with keyed_init("flux2 block", kind), torch.device(device):
        return made(size.width, size.heads, size.head_dim, mlp_ratio=size.mlp_ratio).to(dtype)


def call_of(kind: str, size: Size, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A call of a block on noise; it returns the tokens of both kinds."""
    block = block_of(kind, size, device, dtype)

    def noise(*shape: int) -> Tensor:
        return torch.randn(size.batch, *shape, device=device, dtype=dtype)

    image, text = noise(size.image, size.width).requires_grad_(), noise(size.text, size.width).requires_grad_()
    angles = torch.randn(2, size.image + size.text, size.head_dim, device=device)
    rotary = (angles[0].cos(), angles[1].sin())
    if kind == "double":
        modulations = noise(1, 6 * size.width), noise(1, 6 * size.width)
        return lambda: torch.cat(block(image, text, *modulations, rotary), dim=1)
    modulation = noise(1, 3 * size.width)
    return lambda: block(image, text, modulation, rotary)


def counted_flops(call: Callable[[], object]) -> int:
    """Operations of matrix products and attention in a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure_blocks(name: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Both blocks of a FLUX.2: seconds, TFLOP/s, share of the peak, GB, without and with a backward pass."""
    size = size_of(name)
    return {"size": asdict(size)} | {kind: measure_block(kind, size, repeats, device) for kind in ("double", "single")}


def measure_block(kind: str, size: Size, repeats: int, device: torch.device) -> dict[str, Any]:
    """One block; a backward pass is twice the operations of its forward."""
    call = call_of(kind, size, device, torch.bfloat16)
    found = {}
    for name, run, passes in (("forward", torch.no_grad()(call), 1), ("training", lambda: call().mean().backward(), 3)):
        run()  # warms up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = spread([timed(run, device) for _ in range(repeats)])
        tflops = passes * size.forward_flops(kind) / seconds["median"] / 1e12
        found[name] = {"seconds": seconds, "tflops": tflops, "images_per_s": size.batch / seconds["median"]}
        if device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(device), "bf16")
            found[name] |= {"mfu": tflops / peak if peak else None}
            found[name] |= {"peak_gb": torch.cuda.max_memory_allocated(device) / GB}
    return found
