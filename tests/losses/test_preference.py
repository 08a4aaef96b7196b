"""The preference loss by value: densities against scipy, gradients against finite differences, choices by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from core.diffusion.process import FlowProcess, Process, VPProcess
from core.losses.preference import (
    NoPreference,
    bradley_terry,
    check_rewards,
    choose_pairs,
    log_density,
    log_ratio,
    preference_loss,
)

SHAPE = (3, 1, 2)
VP = VPProcess.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
FLOW = FlowProcess()
PROCESSES = pytest.mark.parametrize(("process", "times"), [(VP, (749, 499)), (FLOW, (750.0, 500.0))])


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A state, a student's x0 and a reference's, two of each, float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))


@PROCESSES
def test_the_log_density_of_a_transition_is_scipys(process: Process, times: tuple[float, ...]) -> None:
    x, x0, _ = states()
    t = torch.tensor(times)
    found = log_density(x, x0, t, process)
    for row, time in enumerate(times):
        variance = 1 - VP.alphas_cumprod[time] if process is VP else (time / 1000) ** 2
        alpha = math.sqrt(VP.alphas_cumprod[time]) if process is VP else 1 - time / 1000
        normal = multivariate_normal(alpha * x0[row].flatten().numpy(), variance * np.eye(6))
        assert found[row].item() == pytest.approx(normal.logpdf(x[row].flatten().numpy()), abs=1e-10)
    torch.testing.assert_close(log_density(x, x0, t, process, mean=True), found / 6, rtol=1e-12, atol=0)


@PROCESSES
def test_a_log_ratio_is_the_difference_of_log_densities(process: Process, times: tuple[float, ...]) -> None:
    x, x0, reference = states()
    t = torch.tensor(times)
    for mean in (False, True):
        expected = log_density(x, x0, t, process, mean=mean) - log_density(x, reference, t, process, mean=mean)
        torch.testing.assert_close(log_ratio(x, x0, reference, t, process, mean=mean), expected, rtol=0, atol=1e-10)


def test_a_log_ratio_of_near_transitions_survives_float32() -> None:
    """At SDXL's size two log densities are of the order 1e5 each; their difference in float32 would be noise."""
    generator = torch.Generator().manual_seed(0)
    x, x0, step = (torch.randn(1, 4, 128, 128, generator=generator) for _ in range(3))
    reference, t = x0 + 1e-5 * step, torch.tensor([749])
    exact = log_ratio(x.double(), x0.double(), reference.double(), t, VP).item()
    assert log_ratio(x, x0, reference, t, VP).item() == pytest.approx(exact, rel=0.02)
    assert log_ratio(x, x0, x0, t, VP).item() == 0


@PROCESSES
def test_the_gradient_is_that_of_finite_differences(process: Process, times: tuple[float, ...]) -> None:
    x0, reference, win = states(1)
    lose, t = states(2)[0], torch.tensor(times)

    def loss(x0: torch.Tensor) -> torch.Tensor:
        ratios = [log_ratio(x, x0, reference, t, process, mean=True) for x in (win, lose)]
        return preference_loss(*ratios, beta=5.0).mean()

    assert torch.autograd.gradcheck(loss, x0.requires_grad_(), eps=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(loss(x0), x0)
    moved = x0.detach() - 1e-3 * gradient
    before, after = (log_density(win, at, t, process) - log_density(lose, at, t, process) for at in (x0, moved))
    assert (after > before).all(), "a step of descent makes what won likelier than what lost"


def test_the_loss_by_hand() -> None:
    win, lose = torch.tensor([0.3, -1.0]), torch.tensor([0.1, -1.0])
    expected = [math.log1p(math.exp(-2.0 * 0.2)), math.log(2)]
    torch.testing.assert_close(preference_loss(win, lose, beta=2.0), torch.tensor(expected))


def test_a_clamped_ratio_has_no_gradient_beyond_its_bounds() -> None:
    """The bounds hold for ratios, 0.9 and 1.1, not for their logarithms."""
    inside, beyond = math.log(1.0999), math.log(1.1001)
    for value, moves in ((inside, True), (beyond, False)):
        win = torch.tensor([value], requires_grad=True)
        preference_loss(win, torch.zeros(1), beta=1.0, clamp=0.1).sum().backward()
        assert bool(win.grad) == moves
    lost = preference_loss(torch.zeros(1), torch.tensor([-9.0]), beta=1.0, clamp=0.1)
    assert lost.item() == pytest.approx(math.log1p(math.exp(math.log(0.9))))


def test_best_and_worst_are_a_pair_where_they_differ_enough() -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.2, 0.2, 0.2, 0.2], [0.5, 0.45, 0.4, 0.5]])
    pairs = choose_pairs(rewards, min_gap=0.2)
    assert pairs.counts.tolist() == [True, False, False]
    assert choose_pairs(rewards).counts.tolist() == [True, False, True], "what is alike is no pair at any gap"
    candidates = torch.arange(12).view(3, 4, 1)
    best, worst = pairs.of(candidates)
    assert best[0].item() == 1 and worst[0].item() == 0 and worst[2].item() == 10


@pytest.mark.parametrize(
    ("rewards", "line"),
    [
        ([[0.1, math.nan], [0.2, math.inf]], "pickscore: 2 of 4 rewards are not finite"),
        ([[0.5, 0.5], [0.5, 0.5]], "pickscore: all 4 rewards are 0.5; a constant prefers nothing"),
    ],
)
def test_a_reward_that_says_nothing_is_told_in_one_line(rewards: list[list[float]], line: str) -> None:
    with pytest.raises(NoPreference) as error:
        check_rewards(torch.tensor(rewards), "pickscore")
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    check_rewards(torch.tensor([[0.5, 0.5], [0.5, 0.6]]), "pickscore")


def test_bradley_terry_is_the_probability_that_the_better_wins() -> None:
    found = bradley_terry(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found, -torch.tensor([1 / (1 + math.exp(-1.0)), 0.5]).log())
