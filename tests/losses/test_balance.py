"""One term's gradient beside another's: norms by sample, direction and value kept."""

import torch

from core.losses.balance import gradient_at, norms, with_gradient_norms


def test_a_term_gets_gradients_of_the_wanted_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, source = torch.randn(3, 2, 4, 4, generator=generator), torch.randn(3, 2, 4, 4, generator=generator)
    weight[2] = 0
    source.requires_grad_()
    x, wanted = 2 * source, torch.tensor([5.0, 0.25, 1.0])
    leaf = x.detach().requires_grad_()
    term = with_gradient_norms((weight * leaf.square()).mean(), leaf, x, wanted)
    assert torch.isclose(term, (weight * x.square()).mean())
    plain = gradient_at((weight * x.square()).mean(), x)
    found = gradient_at(3 * term, x)
    assert torch.allclose(norms(found), 3 * wanted * torch.tensor([1, 1, 0]))
    assert torch.allclose(
        found[:2] / norms(found)[:2].view(-1, 1, 1, 1), plain[:2] / norms(plain)[:2].view(-1, 1, 1, 1)
    )
    term.backward()
    torch.testing.assert_close(source.grad, 2 * found / 3)
