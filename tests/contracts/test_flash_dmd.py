"""Contracts of Flash-DMD's first stage on real tiny networks: DMD2 with nothing on, and each component by itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import UserError, compose
from core.diffusion.solvers import few_step_sample
from core.methods.base import Rollout
from core.training.averages import Averages
from core.training.loop import Trainer
from tests import worlds

OFF = [
    "method.num_low_noise_steps=0", "method.score_ema_decay=1", "method.gan=bottleneck", "method.critic_heads=patch",
    "method.critic_channels=64", "method.adversarial_loss=non_saturating",
]  # fmt: skip
LATENT = [*OFF[2:5], "method.adversarial_loss=hinge"]  # a critic that costs little
KINDS = [("lora", "unet"), ("full", "unet"), ("lora", "flux2"), ("full", "flux2")]  # VP and flow


def flash_dmd(folder: Path, overrides: Sequence[str] = (), sharing: str = "lora", family: str = "unet") -> Trainer:
    fast = ["method.fake_score_lr=1e-3", *overrides]
    return worlds.trainer(folder, fast, sharing, experiment="flash_dmd/tiny", family=family)


def one_rollout(trained: Trainer) -> Rollout:
    return trained.method.rollout(trained.data.batch(trained.clock.positions()), trained.clock)


@pytest.mark.parametrize(("sharing", "family"), [KINDS[0], KINDS[3]])
def test_with_every_component_off_a_training_is_dmd2s_to_the_last_bit(
    tmp_path: Path, sharing: str, family: str
) -> None:
    common = ["method.ttur=2", "train.budget.amount=3", "train.ema_decay=0.9", "method.fake_score_lr=1e-3"]
    ours = worlds.trainer(tmp_path / "a", [*OFF, *common], sharing, experiment="flash_dmd/tiny", family=family)
    dmd2 = worlds.trainer(tmp_path / "b", common, sharing, experiment="dmd2/tiny", family=family)
    for trained in (ours, dmd2):
        trained.train()
    assert worlds.equal(worlds.parameters(ours), worlds.parameters(dmd2))
    assert ours.clock.evaluations == dmd2.clock.evaluations
    lines = [{k: v for k, v in line.items() if "/" in k} for line in (*ours.run.metrics(), *dmd2.run.metrics())]
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert {"gradient/dmd", "gradient/adversarial"} <= lines[0].keys()


@pytest.mark.parametrize(("sharing", "family"), KINDS)
def test_each_loss_acts_at_its_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: str, family: str
) -> None:
    """The DM term's gradient reaches the sample of high noise alone, the critic's that of low noise alone."""
    trained = flash_dmd(tmp_path, LATENT, sharing, family)
    method, made = trained.method, []
    plain = method.student_x0

    def noted(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        x0 = plain(x_t, t, cond)
        if torch.is_grad_enabled():
            made.append((t, x0))
        return x0

    monkeypatch.setattr(method, "student_x0", noted)
    terms = method.losses("student", one_rollout(trained), trained.clock)
    (high_t, high), (low_t, low) = made
    assert set(high_t.tolist()) <= set(method.timesteps[:3].tolist()) and set(low_t.tolist()) == {method.timesteps[3]}
    for name, acts in (("dmd", (True, False)), ("adversarial", (False, True))):
        found = torch.autograd.grad(terms[name], [high, low], allow_unused=True, retain_graph=True)
        assert tuple(g is not None and bool(g.abs().sum() > 0) for g in found) == acts, name
    assert set(method._steps(np.arange(1000))) == {0, 1, 2}


@pytest.mark.parametrize("family", ["unet", "flux2"])
def test_the_critic_judges_what_sampling_makes_noised_again_to_low_noise(tmp_path: Path, family: str) -> None:
    """The sample goes on from where it was: with its own noises it ends where the sampler ends."""
    trained = flash_dmd(tmp_path, LATENT, family=family)
    method, backbone = trained.method, trained.method.backbone
    worlds.move_apart(backbone)
    rollout = one_rollout(trained)
    with torch.no_grad():
        judged = method.judged(rollout, method.student_x0(rollout.x_t, rollout.t, rollout.batch.cond))
    assert len(set(method._steps(rollout.batch.positions))) > 1, "one start would show little"

    def denoise(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return backbone.predict("student", x_t, t, rollout.batch.cond[rows])

    end = few_step_sample(denoise, method.noises(rollout.batch), method.timesteps, backbone.process)
    p, t = rollout.batch.positions, torch.from_numpy(method.timesteps[[3] * 4])
    noise = torch.from_numpy(method.stream("student", "low noise").normal(p, backbone.latent_shape))
    x_t = backbone.process.add_noise(end, noise, t)
    with torch.no_grad():
        expected = method.student_x0(x_t, t, rollout.batch.cond)
    torch.testing.assert_close(judged, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert torch.equal(rollout.judged, judged)


@pytest.mark.parametrize("due", [True, False])
def test_evaluations_of_one_iteration_are_the_necessary_ones(tmp_path: Path, due: bool) -> None:
    """Student: a whole sampling and one call more, whoever has a turn, since the critic reads what its turn made."""
    trained = flash_dmd(tmp_path, LATENT)
    trained.clock.iteration = 0 if due else 1
    trained._iteration()
    expected = {"student": 4 * (4 + 1), "fake_score": 4, "fake_score_features": 8}
    if due:
        expected |= {"teacher": 8, "fake_score": 8, "fake_score_features": 12}
    assert dict(trained.clock.evaluations) == expected


def test_processes_in_lockstep_call_the_student_equally_often(tmp_path: Path) -> None:
    """A sample of the last high step needs no call on its way; one of the first needs two."""
    trained = flash_dmd(tmp_path, LATENT)
    method, calls = trained.method, []
    method.lockstep = True
    predict = method.backbone.predict
    method.backbone.predict = lambda *given: calls.append(len(given[1])) or predict(*given)
    for position in range(8):
        batch = trained.data.batch(np.array([position]))
        calls.clear()
        method._before_the_last(batch.x0, batch)
        assert calls == [1, 1]


@pytest.mark.parametrize("decay", [0.75, 0.0])
@pytest.mark.parametrize(("sharing", "family"), KINDS)
def test_the_score_moves_towards_the_student_after_each_of_its_updates(
    tmp_path: Path, sharing: str, family: str, decay: float
) -> None:
    """psi <- lambda psi + (1 - lambda) theta, by value; the next forward of the score reads it."""
    trained = flash_dmd(tmp_path, [*LATENT, f"method.score_ema_decay={decay}"], sharing, family)
    backbone = trained.method.backbone
    theta, psi = (backbone.role_parameters(role) for role in ("student", "fake_score"))
    assert all(torch.equal(theta[name], value) for name, value in psi.items()), "averaged factors start alike"
    worlds.move_apart(backbone)
    rollouts = [one_rollout(trained)]
    x_t, t, cond = rollouts[0].x_t, rollouts[0].t, rollouts[0].batch.cond
    with torch.no_grad():
        before = backbone.predict("fake_score", x_t, t, cond)
    start = {name: value.detach().clone() for name, value in psi.items()}
    trained._turn(trained.method.turns(trained.clock)[0], rollouts)
    for name, value in psi.items():
        expected = decay * start[name] + (1 - decay) * theta[name].detach()
        torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        after = backbone.predict("fake_score", x_t, t, cond)
        assert (after - before).abs().max() > 1e-3
        if decay == 0:
            torch.testing.assert_close(after, backbone.predict("student", x_t, t, cond))
    moved = {name: value.detach().clone() for name, value in psi.items()}
    trained.clock.iteration = 1
    trained._turn(trained.method.turns(trained.clock)[0], rollouts)
    assert any(not torch.equal(moved[name], value) for name, value in psi.items()), "and it goes on training"


def test_a_score_without_an_average_is_moved_by_its_own_turn_alone(tmp_path: Path) -> None:
    trained = flash_dmd(tmp_path, [*LATENT, "method.score_ema_decay=1"])
    psi = {k: v.clone() for k, v in trained.method.backbone.role_parameters("fake_score").items()}
    trained._turn(trained.method.turns(trained.clock)[0], [one_rollout(trained)])
    for name, value in trained.method.backbone.role_parameters("fake_score").items():
        assert torch.equal(value, psi[name])


def test_a_score_in_bf16_cannot_follow(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fake_score follows student, .* allowed for train.state_dtype: fp32"):
        flash_dmd(tmp_path, [*LATENT, "train.state_dtype=bf16"])
    trained = flash_dmd(tmp_path / "b", [*LATENT, "train.state_dtype=bf16", "method.score_ema_decay=1"])
    assert isinstance(trained.averages, Averages)


def test_the_critics_gradient_has_the_wanted_ratio_to_the_matching_terms(tmp_path: Path) -> None:
    """In the log, for each sample, whatever the weight is and however a batch is split."""

    def logged(name: str, *more: str) -> dict[str, float]:
        trained = flash_dmd(tmp_path / name, ["method.ttur=1", "train.budget.amount=1", *more])
        trained.train()
        return trained.run.metrics()[0]

    ratio = "method.adversarial_ratio=0.25"
    plain, whole, heavy = logged("a"), logged("b", ratio), logged("c", ratio, "method.adversarial_weight=3")
    split = logged("d", ratio, "execution.micro_batch=2")
    for line in (whole, heavy, split):
        assert line["gradient/adversarial"] == pytest.approx(0.25 * line["gradient/dmd"], rel=1e-4)
        for name in ("gradient/dmd", "gradient/adversarial", "student/adversarial", "student/dmd"):
            assert line[name] == pytest.approx(whole[name], rel=1e-3), name
    assert plain["gradient/dmd"] == pytest.approx(whole["gradient/dmd"], rel=1e-6)
    assert plain["student/adversarial"] == pytest.approx(whole["student/adversarial"], rel=1e-6)
    assert plain["gradient/adversarial"] != pytest.approx(whole["gradient/adversarial"], rel=0.1)


def test_the_critic_sees_the_same_part_of_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = flash_dmd(tmp_path, ["method.critic_crop=24"])
    method, seen = trained.method, []
    rollout, pixels = one_rollout(trained), method.backbone.training_pixels
    monkeypatch.setattr(method.backbone, "training_pixels", lambda x: seen.append(x) or pixels(x))
    rollout.judged = rollout.batch.x0 + 1
    method.losses("critic", rollout, trained.clock)
    (shown,), p = seen, rollout.batch.positions
    assert shown.shape == (8, 4, 3, 3)
    torch.testing.assert_close(shown[4:], shown[:4] + 1)
    y, x = (method.stream("critic", f"crop {axis}").integers(p, 0, 6) for axis in "yx")
    assert len(set(zip(y, x, strict=True))) > 1
    for row in range(4):
        part = rollout.batch.x0[row, :, y[row] : y[row] + 3, x[row] : x[row] + 3]
        assert torch.equal(shown[row], part)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.num_low_noise_steps=4", "method.num_low_noise_steps=4 is out of range; allowed: between 0 and 3"),
        ("method.score_ema_decay=1.5", "method.score_ema_decay=1.5 is out of range; allowed: between 0 and 1"),
        ("method.fake_score=student", "method.score_ema_decay=0.95 moves a network, and method.fake_score=student has"),
        ("method.critic_channels=12", "method.critic_channels=12 is not a multiple of 8, as method.critic_heads=poole"),
        ("method.sam_layers=[3,2]", "method.sam_layers=[3, 2]: give numbers from 1 that rise"),
        ("method.critic_heads=none", "method.critic_heads=none is unknown; allowed: patch, pooled"),
        ("method.critic_crop=20", "method.critic_crop=20 does not fit; allowed: 0, or a multiple of 8 up to 64"),
        ("method.critic_crop=128", "method.critic_crop=128 does not fit; allowed: 0, or a multiple of 8 up to 64"),
    ],
)
def test_wrong_settings_are_told_in_one_line(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        flash_dmd(tmp_path, [override])
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_ratio_needs_two_terms_and_a_critic_on_images() -> None:
    for more in (["method.gan=bottleneck"], ["method.dmd_weight=0"]):
        with pytest.raises(UserError, match="method.adversarial_ratio=0.5 needs .* dino, sam, effnet_lite1"):
            compose("flash_dmd/tiny", ["method.adversarial_ratio=0.5", *more])
