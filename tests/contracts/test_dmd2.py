"""Contracts of DMD2 on a real tiny network: ratio of updates, backward simulation, who changes, what is evaluated."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import UserError
from core.data.solutions import SolutionStore
from core.diffusion.solvers import few_step_sample
from core.methods.base import Rollout
from core.methods.dmd2_config import GAN_LOSSES
from core.methods.teacher import teacher_sample
from core.sampler import Sampler
from core.training.loop import Trainer, warmup_factor
from tests import worlds


def dmd2(folder: Path, overrides: Sequence[str] = (), sharing: str = "lora") -> Trainer:
    fast = ["method.student_lr=1e-3", "method.fake_score_lr=1e-3", "method.critic_lr=1e-3"]
    return worlds.trainer(folder, [*fast, *overrides], sharing, experiment="dmd2/tiny")


def one_rollout(trained: Trainer) -> Rollout:
    return trained.method.rollout(trained.data.batch(trained.clock.positions()), trained.clock)


@pytest.mark.parametrize(("ttur", "turns"), [(1, "SSSSSS"), (2, "S-S-S-"), (5, "S----S")])
def test_the_critics_move_in_every_iteration_and_the_student_in_each_fifth(
    tmp_path: Path, ttur: int, turns: str
) -> None:
    """ "5:1" counts critic updates per generator update: the critic is not skipped when the student is due."""
    trained = dmd2(tmp_path, [f"method.ttur={ttur}", "method.gan=effnet_lite1"])
    seen = []
    for _ in turns:
        seen.append([turn.player for turn in trained.method.turns(trained.clock)])
        trained.clock.advance(student="student" in seen[-1])
    assert "".join("S" if "student" in names else "-" for names in seen) == turns
    assert all(names[-2:] == ["fake_score", "critic"] for names in seen)
    assert trained.clock.student_images == 4 * turns.count("S") and trained.clock.images == 4 * len(turns)


def test_a_budget_in_images_counts_what_the_student_learned_from(tmp_path: Path) -> None:
    trained = dmd2(tmp_path, ["method.ttur=4", "train.budget.amount=8", "train.budget.unit=images"])
    trained.train()
    assert (trained.clock.student_images, trained.clock.iteration) == (8, 5)  # turns in iterations 0 and 4


def test_backward_simulation_meets_what_sampling_meets(tmp_path: Path) -> None:
    """The student's sample in training is the one that the sampler makes of the same noises with as many steps."""
    trained = dmd2(tmp_path)
    method, rollout = trained.method, one_rollout(trained)
    with torch.no_grad():
        for parameter in method.backbone.role_parameters("student").values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    rollout = one_rollout(trained)
    x0, p = method.student_x0(rollout.x_t, rollout.t, rollout.batch.cond), rollout.batch.positions
    noises = [torch.from_numpy(method.stream("student", f"noise {k}").normal(p, (4, 8, 8))) for k in range(4)]
    stops = method._steps(p)
    assert len(set(stops)) > 1, "a batch of one length would show little"
    for row, stop in enumerate(stops):
        only = slice(row, row + 1)

        def denoise(x_t, t, rows, only=only):
            return method.backbone.predict("student", x_t, t, rollout.batch.cond[only])

        steps = method.timesteps[: stop + 1]
        expected = few_step_sample(denoise, [n[only] for n in noises[: stop + 1]], steps, method.backbone.process)
        assert rollout.t[row] == method.timesteps[stop]
        torch.testing.assert_close(x0[only], expected, rtol=1e-4, atol=1e-4 * x0[only].abs().max().item())


def test_noised_data_is_the_other_input(tmp_path: Path) -> None:
    trained = dmd2(tmp_path, ["method.student_input=noised_data"])
    method = trained.method
    rollout = method.rollout(trained.data.batch(np.arange(16)), trained.clock)
    noise = torch.from_numpy(method.stream("student", "noise 0").normal(rollout.batch.positions, (4, 8, 8)))
    noised = method.backbone.process.add_noise(rollout.batch.x0, noise, rollout.t)
    at_full_noise = torch.from_numpy(method._steps(rollout.batch.positions) == 0)
    assert 0 < at_full_noise.sum() < len(at_full_noise)
    assert torch.equal(rollout.x_t[at_full_noise], noise[at_full_noise])
    assert torch.equal(rollout.x_t[~at_full_noise], noised[~at_full_noise])
    assert "student" not in method.backbone.evaluations


@pytest.mark.parametrize("due", [True, False])
def test_evaluations_of_one_iteration_are_the_necessary_ones(tmp_path: Path, due: bool) -> None:
    """Student: the sum of the simulations' lengths, and its own call. Teacher: two (guidance), in its turn alone. Fake
    score: the score in the student's turn, denoising in its own; features: fake in the student's turn, both in its own.
    """
    trained = dmd2(tmp_path)
    trained.clock.iteration = 0 if due else 1
    simulated = int(trained.method._steps(trained.clock.positions()).sum())
    trained._iteration()
    expected = {"student": simulated + 4, "fake_score": 4, "fake_score_features": 8}
    if due:
        expected |= {"teacher": 8, "fake_score": 8, "fake_score_features": 12}
    assert dict(trained.clock.evaluations) == expected


def test_zero_weighted_terms_cost_nothing_and_move_nobody_elses_draws(tmp_path: Path) -> None:
    off, none = (dmd2(tmp_path / n, [o]) for n, o in (("a", "method.gan=off"), ("b", "method.adversarial_weight=0")))
    for trained in (off, none):
        trained.train()
        assert "fake_score_features" not in trained.clock.evaluations
    assert worlds.equal(worlds.parameters(off), worlds.parameters(none))
    unmatched = dmd2(tmp_path / "c", ["method.dmd_weight=0"])
    unmatched._iteration()
    assert "teacher" not in unmatched.clock.evaluations
    first, second = one_rollout(dmd2(tmp_path / "d", ["method.gan=off"])), one_rollout(dmd2(tmp_path / "e"))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("x_t", "t"))


@pytest.mark.parametrize(("fake_score", "evaluations"), [("student", 8), ("none", 4)])
def test_without_a_fake_score_of_its_own_the_student_has_every_turn(
    tmp_path: Path, fake_score: str, evaluations: int
) -> None:
    trained = dmd2(tmp_path, [f"method.fake_score={fake_score}", "method.gan=off", "method.num_steps=1"])
    trained._iteration()
    trained._iteration()
    assert set(trained.players) == {"student"} and trained.clock.student_images == 8
    assert dict(trained.clock.evaluations) == {"student": 2 * evaluations, "teacher": 16}


def test_pairs_teach_the_teachers_solutions_in_one_step(tmp_path: Path) -> None:
    """Alone in the first part of the budget, beside the other terms later; only where the student has its turn."""
    options = ["method.regression_init=0.5", "method.regression_weight=0.25", "method.regression_steps=4"]
    trained = dmd2(tmp_path, options)
    method, early = trained.method, one_rollout(trained)
    noise = early.pair_noise
    sampler = Sampler("dpmpp_2m", 4, 8.0)
    expected = teacher_sample(method.backbone, noise, early.batch.cond, early.batch.null, sampler)
    torch.testing.assert_close(early.pair_x0, expected)
    terms = method.losses("student", early, trained.clock)
    x0 = method.backbone.predict("student", noise, torch.full((4,), 999), early.batch.cond)
    assert set(terms) == {"regression"}
    assert terms["regression"].item() == pytest.approx((x0 - expected).square().mean().item(), rel=1e-4)
    recorded = []
    method.backbone.keep_adapters_apart()  # one network, which is listened to
    method.backbone.roles.base.register_forward_hook(lambda *given: recorded.append(torch.is_grad_enabled()))
    method.losses("student", early, trained.clock)
    assert recorded == [False, True], "of its sample, which the critics read, nothing is kept for a backward pass"
    trained.clock.iteration, trained.clock.images = 4, 16
    assert set(method.losses("student", one_rollout(trained), trained.clock)) == {"regression", "dmd", "adversarial"}
    assert method.weights("student", trained.clock)["regression"] == 0.25
    trained.clock.iteration = 5
    assert one_rollout(trained).pair_x0 is None
    trained.clock.iteration = 0
    assert dmd2(tmp_path / "b").method.config.teacher_problem is None is not method.config.teacher_problem


def test_pairs_are_stored_and_shared(tmp_path: Path) -> None:
    def cell(name: str, lr: str) -> Trainer:
        store = SolutionStore(tmp_path / "store", {"problem": 1}, 32, (4, 8, 8))
        options = ["method.regression_weight=0.25", "method.regression_steps=4", "method.gan=off", lr]
        trained = worlds.trainer(tmp_path / name, options, experiment="dmd2/tiny", solutions=store)
        trained.train()
        return trained

    first, second = cell("a", "method.fake_score_lr=1e-4"), cell("b", "method.fake_score_lr=1e-3")
    solved = 4 * 4 * 2 * 4  # turns of the student, images, guidance, steps
    assert (first.clock.stored, second.clock.stored) == (0, solved)
    assert first.clock.evaluations["teacher"] - second.clock.evaluations["teacher"] == solved


def test_resume_is_bit_exact_between_two_turns_of_the_student(tmp_path: Path) -> None:
    options = ["method.ttur=3", "train.ema_decay=0.9", "train.budget.unit=images", "train.budget.amount=12"]
    whole = dmd2(tmp_path / "whole", options)
    whole.train()
    with pytest.raises(Exception, match="stopped at 16 images"):
        dmd2(tmp_path / "cut", [*options, "execution.stop_after_images=16"]).train()
    resumed = dmd2(tmp_path / "cut", options)
    assert (resumed.clock.images, resumed.clock.student_images) == (16, 8)
    resumed.train()
    assert worlds.equal(worlds.parameters(whole), worlds.parameters(resumed))
    assert resumed.clock.evaluations == whole.clock.evaluations


def test_another_micro_batch_gives_the_same_curve(tmp_path: Path) -> None:
    whole, split = (dmd2(tmp_path / str(n), [f"execution.micro_batch={n}"]) for n in (4, 2))
    whole.train()
    split.train()
    for a, b in zip(whole.run.metrics(), split.run.metrics(), strict=True):
        assert a.keys() == b.keys() and "fake_score/critic" in a
        for term in ("student/dmd", "student/adversarial", "fake_score/denoise", "fake_score/critic"):
            if term in a:  # the student has its turn in every second line
                assert a[term] == pytest.approx(b[term], rel=1e-4), term
    assert whole.clock.evaluations == split.clock.evaluations


def test_the_fake_scores_loss_is_denoising_in_the_networks_own_terms(tmp_path: Path) -> None:
    trained = dmd2(tmp_path, ["method.gan=off"])
    method, backbone, rollout = trained.method, trained.method.backbone, one_rollout(trained)
    rollout.samples = samples = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = method.losses("fake_score", rollout, trained.clock)["denoise"]
    p, cond = rollout.batch.positions, rollout.batch.cond
    t = torch.from_numpy((method.stream("fake_score", "timestep").uniform(p) * 1000).astype(np.int64))
    eps = torch.from_numpy(method.stream("fake_score", "noise").normal(p, (4, 8, 8)))
    alpha = torch.from_numpy(backbone.process.alphas_cumprod).sqrt().float()[t].view(-1, 1, 1, 1)
    x_t = alpha * samples + (1 - alpha**2).sqrt() * eps
    raw = backbone.network("fake_score", x_t, t, cond)
    assert backbone.prediction == "eps"
    assert loss.item() == pytest.approx((raw - eps).square().mean().item(), rel=1e-4)


def test_the_warm_up_raises_every_players_learning_rate(tmp_path: Path) -> None:
    assert [warmup_factor(n, 4) for n in range(5)] == [0.25, 0.5, 0.75, 1, 1] and warmup_factor(0, 0) == 1
    trained = dmd2(tmp_path, ["train.lr_warmup_iterations=4"])
    trained._iteration()
    assert [p.optimizer.param_groups[0]["lr"] for p in trained.players.values()] == pytest.approx([2.5e-4] * 2)


@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_every_game_trains_student_and_critic_and_wgan_clips_the_critic_alone(tmp_path: Path, loss: str) -> None:
    gan = "effnet_lite1" if loss == "wgan" else "bottleneck"
    weights = ["method.adversarial_weight=1", "method.critic_weight=1", "method.dmd_weight=0", "method.ttur=1"]
    trained = dmd2(tmp_path, [f"method.adversarial_loss={loss}", f"method.gan={gan}", *weights])
    before = worlds.parameters(trained)
    trained._iteration()
    after = worlds.parameters(trained)
    for name in after:
        if "lora_B" in name or "critic" in name:  # weight decay alone moves lora_A
            assert not torch.equal(before[name], after[name]), name
    largest = {name: max(p.abs().max().item() for p in player.parameters.values())
               for name, player in trained.players.items()}  # fmt: skip
    assert largest["student"] > 0.02 and largest["fake_score"] > 0.02
    assert loss != "wgan" or largest["critic"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.adversarial_loss=wgan", "method.adversarial_loss=wgan clips the weights of its critic, and with meth"),
        ("method.ttur=0", "method.ttur=0 is out of range; allowed: at least 1"),
        ("method.fake_score=none", "method.gan=bottleneck is the fake score's, and method.fake_score=none has no net"),
        ("method.gan=dino", "method.gan=dino needs method.dino_path: a folder of DINO"),
        ("method.dmd_max=0.01", "method.dmd_max=0.01 is out of range; allowed: between 0.02 and 0.999"),
        (
            "method.student_input=data",
            "method.student_input=data is unknown; allowed: backward_simulation, noised_data",
        ),
    ],
)
def test_wrong_settings_are_told_in_one_line(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        dmd2(tmp_path, [override])
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
