"""bf16 parameters and moments: what rounding to nearest loses, and what rounding by chance keeps."""

import math
from pathlib import Path

import pytest
import torch

from core.training.rounding import StochasticAdamW, stochastic_round
from tests import worlds


def test_rounding_by_chance_is_right_on_average_and_a_neighbour() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, 1.001, -1.001, 3.14159e-5, -7.0e8, 0.0])
    drawn = torch.stack([stochastic_round(values, generator) for _ in range(20_000)])
    assert drawn.dtype == torch.bfloat16
    low = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    step = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32) - low
    for column, below, width in zip(drawn.float().T, low, step, strict=True):
        assert set(column.tolist()) <= {below.item(), (below + width).item()}
    # of 20,000 draws the mean is within 4 standard deviations of at most half a step
    assert ((drawn.float().mean(0) - values).abs() <= 4 * 0.5 * step.abs() / 20_000**0.5 + 1e-12).all()
    assert torch.equal(drawn[:, 0], torch.ones(20_000, dtype=torch.bfloat16)), "what bf16 can hold stays as it is"


def descend(optimizer: type, parameter: torch.Tensor, **more: object) -> float:
    """1,000 updates of lr 1e-4 on a constant gradient; how far the mean has moved."""
    start = parameter.float().mean().item()
    tool = optimizer([parameter], lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, **more)
    for _ in range(1000):
        parameter.grad = torch.full_like(parameter, 0.1)
        tool.step()
    return start - parameter.float().mean().item()


def test_small_updates_vanish_when_rounded_to_nearest_and_count_when_rounded_by_chance() -> None:
    exact = descend(torch.optim.AdamW, torch.ones(64))
    nearest = descend(torch.optim.AdamW, torch.ones(64, dtype=torch.bfloat16), fused=True)
    chance = descend(StochasticAdamW, torch.ones(64, dtype=torch.bfloat16), keys=[(0,)])
    assert exact == pytest.approx(0.1, rel=1e-3)
    assert nearest == 0
    assert chance == pytest.approx(exact, rel=0.1)


def test_its_arithmetic_is_that_of_adamw() -> None:
    """In one update from zero moments, to the rounding of bf16."""
    gradient = torch.linspace(-1, 1, 33)
    ours, theirs = torch.ones(33, dtype=torch.bfloat16), torch.ones(33)
    for parameter, tool in (
        (ours, StochasticAdamW([ours], 0.5, (0.9, 0.99), 0.1, keys=[(0,)])),
        (theirs, torch.optim.AdamW([theirs], 0.5, (0.9, 0.99), weight_decay=0.1)),
    ):
        parameter.grad = gradient.to(parameter.dtype)
        tool.step()
    torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("state_dtype", ["bf16", "bf16_stochastic"])
def test_everything_that_trains_is_bf16_and_its_average_is_not(tmp_path: Path, state_dtype: str) -> None:
    options = [f"train.state_dtype={state_dtype}", "train.ema_decay=0.9"]
    trained = worlds.trainer(tmp_path / "whole", options)
    trained.train()
    for player in trained.players.values():
        assert {p.dtype for p in player.trained} == {torch.bfloat16}
        moments = {m.dtype for p in player.parts for k, m in player.optimizer.state[p].items() if "exp_avg" in k}
        assert moments == {torch.bfloat16}
    averages = trained.method.backbone.role_parameters("student_ema")
    assert {average.dtype for average in averages.values()} == {torch.float32}
    with pytest.raises(Exception, match="stopped at 12 images"):
        worlds.trainer(tmp_path / "cut", [*options, "execution.stop_after_images=12"]).train()
    resumed = worlds.trainer(tmp_path / "cut", options)
    resumed.train()
    assert worlds.equal(worlds.parameters(trained), worlds.parameters(resumed)), "draws are keyed: resume is exact"


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "bf16_stochastic"])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_not_counted(tmp_path: Path, state_dtype: str) -> None:
    trained = worlds.trainer(tmp_path, [f"train.state_dtype={state_dtype}"])
    trained._iteration()
    healthy, losses = worlds.parameters(trained), trained.method.losses
    trained.method.losses = lambda *given: {name: term * float("nan") for name, term in losses(*given).items()}
    trained._iteration()
    assert worlds.equal(worlds.parameters(trained), healthy)
    student = trained.players["student"]
    assert {student.optimizer.state[part]["step"].item() for part in student.parts} == {1}
    trained.method.losses = losses
    trained._iteration()
    assert {student.optimizer.state[part]["step"].item() for part in student.parts} == {2}


def test_after_a_skipped_update_the_next_is_corrected_for_those_that_were_taken() -> None:
    """Corrected for three, the second update would be 14% too short."""
    ours, theirs = torch.ones(33, dtype=torch.bfloat16), torch.ones(33)
    tool = StochasticAdamW([ours], 0.5, (0.9, 0.99), 0.0, keys=[(0,)])
    exact = torch.optim.AdamW([theirs], 0.5, (0.9, 0.99), weight_decay=0.0)
    for gradient in (0.25, math.nan, 0.5):
        ours.grad = torch.full_like(ours, gradient)
        tool.found_inf = torch.tensor(float(math.isnan(gradient)))
        tool.step()
        if not math.isnan(gradient):
            theirs.grad = torch.full_like(theirs, gradient)
            exact.step()
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2**-7)
    assert tool.state[ours]["draws"] == 3, "the next draws are new ones"


def test_a_state_of_before_draws_were_counted_goes_on_with_the_same_draws() -> None:
    found = []
    for forget in (False, True):
        parameter = torch.ones(33, dtype=torch.bfloat16)
        tool = StochasticAdamW([parameter], 1e-3, (0.9, 0.99), 0.0, keys=[(0,)])
        for _ in range(2):
            parameter.grad = torch.full_like(parameter, 0.1)
            tool.step()
            if forget:
                tool.state[parameter].pop("draws")
        found.append(parameter)
    assert torch.equal(*found)
