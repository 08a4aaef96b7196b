"""Guidance has one convention: w = 1 is none, and public code's excess form is one more."""

from __future__ import annotations

import torch

from core.diffusion.guidance import combine, from_excess


def test_guidance_extrapolates_from_null_through_cond() -> None:
    cond, null = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), 1.0)
    assert combine(cond, null, 4.0).flatten().tolist() == [5.0] * 3
    assert combine(cond, null, torch.tensor([0.0, 1.0, 4.0])).flatten().tolist() == [1.0, 2.0, 5.0]


def test_no_guidance_is_exactly_the_conditional_prediction() -> None:
    cond, null = torch.randn(2, 4, 2, 2), 1e6 * torch.randn(2, 4, 2, 2)
    assert torch.equal(combine(cond, null, 1.0), cond)


def test_the_excess_form_is_one_more() -> None:
    cond, null = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    torch.testing.assert_close(combine(cond, null, from_excess(7.5)), cond + 7.5 * (cond - null))
