"""One term's gradient measured against another's, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor


def norms(gradient: Tensor) -> Tensor:
    """L2 norms of the samples of (B, ...), float32 (B,)."""
    return gradient.detach().float().flatten(1).norm(dim=1)


def gradient_at(term: Tensor, x: Tensor) -> Tensor:
    """The gradient of a scalar at ``x``, without touching anybody's ``grad``; the graph of ``term`` is kept."""
    (gradient,) = torch.autograd.grad(term, x, retain_graph=True)
    return gradient


def with_gradient_norms(term: Tensor, leaf: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
    """A scalar of the value of ``term``, whose gradient at ``x`` points as that of ``term`` at ``leaf`` does.

    ``leaf`` is ``x`` without its graph, and ``wanted`` (B,) are the gradient's norms, by sample. A gradient that is
    zero stays zero. The graph of ``term`` is freed.
    """
    (gradient,) = torch.autograd.grad(term, leaf)
    found = norms(gradient)
    scale = torch.where(found > 0, wanted / found, 0.0)
    gradient = gradient * scale.view(-1, *[1] * (gradient.dim() - 1)).to(gradient.dtype)
    linear = (gradient * x).sum()
    return term.detach() + linear - linear.detach()
