"""The optimiser of the embedded teacher."""

import pytest
import torch

from experiments.emoji.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(32, 32), (16, 144), (144, 16)])
def test_an_update_keeps_the_singular_vectors_and_evens_out_the_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalised(matrix) @ right.T
    strong = values > 0.05 * values.max()  # five steps do not lift the weakest directions all the way
    assert (turned.diag()[strong] - 1).abs().max() < 0.35
    assert (turned - turned.diag().diag()).abs().max() < 1e-3


def test_a_convolution_moves_by_the_learning_rate_and_decays() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 16, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer = Muon([weight], lr=0.1)
    optimizer.step()
    # 16 singular values over 16 x 144 entries, scaled by 0.2 sqrt(144): an RMS of 0.2 times theirs (0.7 to 1.2).
    assert 0.7 < weight.square().mean().sqrt().item() / (0.1 * 0.2) < 1.2
    before = weight.detach().clone()
    weight.grad.zero_()
    optimizer.state[weight]["momentum"].zero_()
    optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.1 * 0.01))
