"""The optimiser of the embedded teacher."""

import pytest
import torch

from experiments.emoji.recipes.muon import Muon, MuonAdamW, orthogonalised


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


def test_the_pair_resumes_exactly_and_leaves_frozen_weights_alone() -> None:
    def network() -> torch.nn.Sequential:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
        layers[0].requires_grad_(False)
        return layers

    def update(layers: torch.nn.Sequential, optimizer: MuonAdamW, position: int) -> None:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(position))
        layers(x).square().mean().backward()
        optimizer.step(lr=0.05)

    whole, half = network(), network()
    first, before = MuonAdamW(whole, 0.1, 0.01), MuonAdamW(half, 0.1, 0.01)
    for position in range(4):
        update(whole, first, position)
    for position in range(2):
        update(half, before, position)
    after = MuonAdamW(half, 0.1, 0.01)
    after.load_state_dict(before.state_dict())
    for position in (2, 3):
        update(half, after, position)
    fresh = network()
    for ours, theirs, start in zip(whole.parameters(), half.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, start) != ours.requires_grad
