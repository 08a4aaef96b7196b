"""The arithmetic of a forward pass: autocast, and how 16-bit products are made where a CPU has no units for them.

A CPU without 16-bit units (before AVX-512) multiplies bfloat16 by a reference implementation, twelve times slower than
fp32. There the operands of products are rounded to bfloat16 as ever, multiplied and summed in fp32, and the result is
rounded: what the units do, too. Results differ from theirs by the order of a sum, as those of two CPUs do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# The products that autocast computes in 16 bits, as networks call them
PRODUCTS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm,
    Tensor.bmm, torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm,
}  # fmt: skip


class WidenedProducts(TorchFunctionMode):
    """Products of autocast with 16-bit operands and results, computed in fp32 between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            operands = [self._widened(value) for value in args]
            named = {name: self._widened(value) for name, value in kwargs.items()}
            return func(*operands, **named).to(self.dtype)

    def _widened(self, value: Any) -> Any:
        is_operand = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype).to(torch.float32) if is_operand else value


@functools.cache
def lacks_units_for_16_bits() -> bool:
    """Whether this CPU multiplies bfloat16 by a reference implementation."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def computing_in(dtype: torch.dtype | None, like: Tensor) -> Iterator[None]:
    """Autocast to ``dtype`` on the device of ``like``; None: no autocast, numbers stay as they are stored.

    Where a CPU needs gradients, attention is computed by matrix products: the gradient of torch's fused attention takes
    ten times as long in 16 bit as in fp32, and half of a training step.
    """
    if dtype is None:
        yield
        return
    fused = not (like.device.type == "cpu" and torch.is_grad_enabled())
    with torch.autocast(like.device.type, dtype=dtype), _products(fused, _widened_dtype()):
        yield


def _widened_dtype() -> torch.dtype | None:
    """The dtype of autocast on a CPU whose products must be widened; None: they are computed as they are."""
    is_needed = torch.is_autocast_enabled("cpu") and lacks_units_for_16_bits()
    return torch.get_autocast_dtype("cpu") if is_needed else None


def computing_as_now() -> AbstractContextManager:
    """A context that computes products as they are now: a recomputation must save the same tensors again."""
    fused = torch.backends.cuda.flash_sdp_enabled()  # of every device, whatever its name says
    return _products(fused, _widened_dtype())


def recomputed(function: Callable, *args: Any) -> Any:
    """``function(*args)``, which keeps its arguments alone and is computed again in the backward pass."""
    contexts = lambda: (nullcontext(), computing_as_now())  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def _products(fused: bool, widened: torch.dtype | None) -> Iterator[None]:
    """``fused``: attention as one function; ``widened``: the dtype of products that are computed in fp32."""
    with ExitStack() as contexts:
        if not fused:
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        if widened is not None:
            contexts.enter_context(WidenedProducts(widened))
        yield
