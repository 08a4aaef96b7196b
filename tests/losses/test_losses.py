"""Losses by value, gradient and sign."""

from __future__ import annotations

import math

import pytest
import torch

from core.losses.adversarial import GAN_LOSSES
from core.losses.distill import DISTILL_LOSSES, huber
from core.losses.matching import dmd_gradient, dmd_loss
from core.losses.perceptual import PERCEPTUAL_LOSSES
from core.methods import flash_config


def test_mse_is_per_sample() -> None:
    pred = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 4, 2, 2)
    assert DISTILL_LOSSES["mse"](pred.bfloat16(), torch.zeros(2, 4, 2, 2)).tolist() == [1.0, 9.0]


def test_dmd_gradient_has_one_normaliser_per_sample() -> None:
    """The second sample is 100 times farther: a normaliser of the batch would drown the first."""
    x0 = torch.zeros(2, 1, 1, 2)
    real = torch.tensor([[1.0, -3.0], [100.0, -300.0]]).view(2, 1, 1, 2)  # mean |x0 - real| = 2 and 200
    fake = real + torch.tensor([[1.0, 2.0], [4.0, -2.0]]).view(2, 1, 1, 2)
    expected = torch.tensor([[0.5, 1.0], [0.02, -0.01]]).view(2, 1, 1, 2)
    torch.testing.assert_close(dmd_gradient(x0, real, fake), expected, rtol=1e-5, atol=0)


def test_dmd_gradient_is_finite_and_float32_when_the_student_is_the_teacher() -> None:
    x0 = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    gradient = dmd_gradient(x0, x0, x0)
    assert gradient.dtype == torch.float32 and not gradient.any()
    # 1e-5 in the denominator alone: not clamped, not larger
    torch.testing.assert_close(dmd_gradient(x0, x0, x0 + 1), torch.full((1, 1, 2, 2), 1e5))


def test_dmd_loss_moves_the_student_from_fake_to_real() -> None:
    x0 = torch.zeros(2, 1, 2, 2, requires_grad=True)
    real, fake = torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), -1.0)
    gradient = dmd_gradient(x0, real, fake)
    loss = dmd_loss(x0, gradient)
    (step,) = torch.autograd.grad(loss, x0)
    torch.testing.assert_close(loss, gradient.square().mean())
    torch.testing.assert_close(step, 2 * gradient / gradient.numel())
    assert (step < 0).all()  # descent raises x0 towards the teacher's 1


def test_lsgan_is_equation_8_on_raw_logits() -> None:
    loss = GAN_LOSSES["lsgan"]()
    fake, real = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 5.0])
    assert loss.generator(fake).item() == 0.5 * (4 + 4) / 2
    assert loss.discriminator(real, fake).item() == 0.5 * ((0 + 16) / 2 + (9 + 1) / 2)


def test_l1_is_per_sample() -> None:
    pred = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1).expand(2, 4, 2, 2)
    assert DISTILL_LOSSES["l1"](pred, torch.zeros(2, 4, 2, 2)).tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("name", "generator", "discriminator"),
    [
        ("hinge", -1.0, (0.5 + 0.0) / 2 + (4.0 + 0.0) / 2),
        ("wgan", -1.0, 1.0 - 2.75),
        ("non_saturating", (math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2, None),
    ],
)
def test_gan_losses_by_value(name: str, generator: float, discriminator: float | None) -> None:
    fake, real = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 5.0])
    loss = GAN_LOSSES[name]()
    assert loss.generator(fake).item() == pytest.approx(generator)
    if discriminator is None:  # -log sigmoid(real) - log(1 - sigmoid(fake)), as a probability
        discriminator = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()).item()
    assert loss.discriminator(real, fake).item() == pytest.approx(discriminator, rel=1e-5)


def test_relativistic_loss_reads_differences_within_pairs_alone() -> None:
    loss = GAN_LOSSES["relativistic"]()
    fake, real = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])  # real - fake: -2, 2
    apart = (math.log1p(math.exp(2)) + math.log1p(math.exp(-2))) / 2
    assert loss.discriminator(real, fake).item() == pytest.approx(apart)
    assert loss.generator(fake, real).item() == pytest.approx(apart)
    shared = torch.tensor([100.0, -7.0])
    assert loss.generator(fake + shared, real + shared).item() == pytest.approx(apart)


def test_the_configuration_names_every_loss() -> None:
    assert set(flash_config.ADVERSARIAL_LOSSES) == set(GAN_LOSSES)
    assert set(flash_config.DISTILL_LOSSES) == {*DISTILL_LOSSES, *PERCEPTUAL_LOSSES}


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_gan_losses_pull_logits_apart(name: str) -> None:
    real, fake = torch.zeros(4, requires_grad=True), torch.full((4,), 0.5, requires_grad=True)
    loss = GAN_LOSSES[name]()
    to_real, to_fake = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
    assert (to_real < 0).all() and (to_fake > 0).all()
    assert (torch.autograd.grad(loss.generator(fake, real.detach()), fake)[0] < 0).all()


def test_huber_is_quadratic_below_its_constant_and_linear_above() -> None:
    """sqrt(d^2 + c^2) - c by value, and its two limits."""
    zero = torch.zeros(1, 1, 1, 2)
    both = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2)
    expected = (math.sqrt(9 + 0.25) + math.sqrt(16 + 0.25)) / 2 - 0.5
    assert huber(both, zero, 0.5).item() == pytest.approx(expected)
    assert huber(1e-3 * both, zero, 1.0).item() == pytest.approx(12.5 * 1e-6 / 2, rel=1e-3, abs=1e-7)
    assert huber(both, zero, 1e-6).item() == pytest.approx(3.5, rel=1e-5)
