"""16-bit products on a CPU without units for them: what units compute, in forward, gradient and recomputation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.backbones import precision
from core.backbones.base import STUDENT, Cond
from core.backbones.precision import WidenedProducts, computing_in
from tests import worlds

BF16 = torch.bfloat16
_DRAWS = torch.Generator().manual_seed(0)
X, W, B = (torch.randn(shape, generator=_DRAWS) for shape in ((3, 8, 6, 6), (8, 8, 3, 3), (8,)))
# No number is an operand twice: its gradient would be a sum of rounded ones, of which the difference can be small
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "conv2d": lambda x, w, b: F.conv2d(x, w, b, padding=1),
    "linear": lambda x, w, b: F.linear(x.movedim(1, -1), w[:, :, 1, 1], b),
    "matmul": lambda x, w, b: x.flatten(1)[:, :8] @ w[:, :, 0, 0],
    "method": lambda x, w, b: x[:, :, :3, :3].matmul(w[0, 0]),
    "bmm": lambda x, w, b: torch.bmm(x[0], x[1]),
    "baddbmm": lambda x, w, b: torch.baddbmm(x[2, :, :1], x[0], x[1]),
    "attention": lambda x, w, b: F.scaled_dot_product_attention(x[:, :2], x[:, 2:4], x[:, 4:6]),
}


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without 16-bit units, whatever this one has."""
    monkeypatch.setattr(precision, "lacks_units_for_16_bits", lambda: True)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_has_16_bit_operands_and_a_16_bit_result_of_an_exact_sum(widened: None, name: str) -> None:
    function, operands = PRODUCTS[name], [value.clone().requires_grad_() for value in (X, W, B)]
    with computing_in(BF16, X):
        found = function(*operands)
    rounded = [value.detach().to(BF16).double().requires_grad_() for value in operands]
    exact = function(*rounded)
    assert found.dtype == BF16
    torch.testing.assert_close(found.double(), exact.to(BF16).double(), rtol=2**-7, atol=1e-6)
    assert (found.double() == exact.to(BF16).double()).float().mean() > 0.98, "but for ties, to the last bit"
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    found.backward(upstream)
    exact.backward(upstream.double())
    for ours, theirs in zip(operands, rounded, strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2**-7, atol=0.02)


def test_only_products_of_autocast_are_touched() -> None:
    with WidenedProducts(BF16):
        assert torch.equal(F.linear(X, W[0, 0, 0].repeat(2).expand(4, 6)), X @ W[0, 0, 0].repeat(2).expand(4, 6).T)
        assert F.linear(X.double(), torch.ones(1, 6).double()).dtype == torch.float64
    with computing_in(None, X):
        assert (X[0] @ X[1]).dtype == torch.float32


def test_a_network_computes_what_it_computes_with_units(widened: None, tmp_path: Path) -> None:
    """Both differ from fp32 by the same rounding; torch's own 16-bit products are the units here, fast or not."""
    backbone = worlds.backbone(tmp_path)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([900, 100])
    cond = Cond({"text": torch.randn(2, 16, 16)})
    with torch.no_grad():
        exact = backbone.predict("teacher", x_t, t, cond, "eps")
        backbone.compute_dtype = BF16
        found = backbone.predict("teacher", x_t, t, cond, "eps")
        precision.lacks_units_for_16_bits = lambda: False  # undone with the fixture's
        native = backbone.predict("teacher", x_t, t, cond, "eps")
    rounding = (native - exact).norm()
    assert 0 < (found - exact).norm() < 1.5 * rounding and (found - native).norm() < 1.5 * rounding


@pytest.mark.parametrize("family", ["unet", "flux2"])
def test_what_is_computed_again_is_computed_the_same_way(widened: None, tmp_path: Path, family: str) -> None:
    """Outside of the forward's context; other kinds of tensors saved would be an error."""
    gradients = []
    for checkpointing in (False, True):
        backbone = worlds.backbone(tmp_path / str(checkpointing), family=family)
        backbone.compute_dtype = BF16
        backbone.add_role(STUDENT, trainable=True)
        if checkpointing:
            backbone.enable_activation_checkpointing()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x_t = torch.randn(2, *backbone.latent_shape)
            cond = Cond({name: torch.randn(2, *shape) for name, shape in worlds.CONDS[family].items()})
        backbone.predict(STUDENT, x_t, torch.tensor([900.0, 100.0]), cond).square().mean().backward()
        gradients.append([p.grad for p in backbone.role_parameters(STUDENT).values()])
    assert max(gradient.abs().max() for gradient in gradients[0]) > 0
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)
