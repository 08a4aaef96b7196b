"""Contracts of Flash Diffusion on a real tiny network: who changes, what is evaluated, what a zero weight costs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.backbones.base import Cond
from core.data.solutions import Busy, SolutionStore
from core.losses.perceptual import EffnetDistance
from core.training.loop import Trainer
from tests import worlds

NO_GAN, NO_DMD = "method.adversarial_weight=[0,0,0,0]", "method.dmd_weight=[0,0,0,0]"
ALWAYS = ("method.adversarial_weight=[.1,.1,.1,.1]", "method.dmd_weight=[.3,.3,.3,.3]")


@pytest.mark.parametrize("loss", ["l1", "effnet_lite1"])
def test_another_distillation_loss_is_that_distance_to_the_teachers_solution(tmp_path: Path, loss: str) -> None:
    """A perceptual one compares decoded images; its gradient reaches the student and neither VAE nor judge."""
    trained = worlds.trainer(tmp_path, [f"method.distill_loss={loss}", NO_GAN, NO_DMD])
    method, rollout = trained.method, one_rollout(trained)
    terms = method.losses("student", rollout, trained.clock)
    x0, target = rollout.samples, rollout.target
    if loss == "l1":
        expected = (x0 - target).abs().mean()
    else:
        backbone, distance = method.backbone, EffnetDistance()
        expected = distance(backbone.pixels(x0), backbone.pixels(target)).mean()
        terms["distill"].backward()
        assert any(p.grad is not None and p.grad.any() for p in backbone.role_parameters("student").values())
        assert all(p.grad is None for p in (*backbone.vae.parameters(), *method.distill.distance.parameters()))
    assert terms["distill"].item() == pytest.approx(expected.item(), rel=1e-5)


def one_rollout(trained: Trainer):
    batch = trained.data.batch(trained.clock.positions())
    return trained.method.rollout(batch, trained.clock)


@pytest.mark.parametrize("gan", ["lsgan", "relativistic"])
def test_evaluations_of_one_iteration_are_the_necessary_ones(gan: str, tmp_path: Path) -> None:
    """Teacher: the active set's sum of steps, twice for guidance, plus the DMD score. Student: its own forward and the
    fake score. Critic features: fake once (reused detached), real once,
    also where both players read them."""
    trained = worlds.trainer(tmp_path, [*ALWAYS, f"method.adversarial_loss={gan}"])
    method, batch = trained.method, trained.data.batch(trained.clock.positions())
    t = method.rollout(batch, trained.clock).t.numpy()
    index = np.array([list(method.timesteps).index(value) for value in t])
    trained.method.backbone.evaluations.clear()
    trained._iteration()
    solver = 2 * int((method.config.num_timesteps - index).sum())
    assert dict(trained.clock.evaluations) == {
        "teacher": solver + 2 * len(index),
        "student": 2 * len(index),
        "teacher_features": 2 * len(index),
    }


def test_zero_weighted_terms_cost_nothing(tmp_path: Path) -> None:
    trained = worlds.trainer(tmp_path, [NO_GAN, NO_DMD])
    trained._iteration()
    assert set(trained.players) == {"student"}
    assert "teacher_features" not in trained.clock.evaluations
    assert trained.clock.evaluations["student"] == 4
    undistilled = worlds.trainer(tmp_path / "b", ["method.distill_weight=0", *ALWAYS])
    undistilled._iteration()
    assert undistilled.clock.evaluations["teacher"] == 8  # the DMD score alone: no teacher solve


def test_a_student_without_any_term_waits_for_its_stage_while_the_critic_learns(tmp_path: Path) -> None:
    """adversarial + DMD without distillation: the weights of the first stage are zero."""
    late = ("method.adversarial_weight=[0,.1,.1,.1]", "method.dmd_weight=[0,.3,.3,.3]")
    trained = worlds.trainer(tmp_path, ["method.distill_weight=0", *late])
    before = worlds.parameters(trained)
    trained.train(until=0.25)
    after = worlds.parameters(trained)
    changed = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"critic"} and trained.clock.student_images == 8
    trained.train()
    last = worlds.parameters(trained)
    assert any(not torch.equal(after[name], last[name]) for name in after if name.startswith("student/"))


def test_a_zero_weight_equals_an_absent_term_and_moves_nobody_elses_draws(tmp_path: Path) -> None:
    """The student of a run whose GAN weight is zero in all but the last stage is bit-identical until that stage."""
    curves = []
    for name, weights in (("off", "[0,0,0,0]"), ("late", "[0,0,0,.5]")):
        trained = worlds.trainer(tmp_path / name, [f"method.adversarial_weight={weights}"])
        trained.train(until=0.75)
        curves.append({k: v for k, v in worlds.parameters(trained).items() if k.startswith("student/")})
    assert worlds.equal(*curves)


def test_cells_downstream_of_the_teacher_pose_the_same_problems(tmp_path: Path) -> None:
    a, b = (worlds.trainer(tmp_path / n, o) for n, o in (("a", [NO_GAN, NO_DMD]), ("b", ALWAYS)))
    first, second = one_rollout(a), one_rollout(b)
    for name in ("x_t", "t", "target"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_a_second_cell_spends_no_teacher_solves(tmp_path: Path) -> None:
    def cell(name: str, overrides: list[str]) -> Trainer:
        store = SolutionStore(tmp_path / "store", {"problem": 1}, 32, (4, 8, 8))
        trained = worlds.trainer(tmp_path / name, overrides, solutions=store)
        trained.train()
        return trained

    first, second = cell("a", [NO_GAN, NO_DMD]), cell("b", [NO_GAN, NO_DMD, "seed=0", "train.max_grad_norm=0.5"])
    assert first.clock.stored == 0 and first.clock.evaluations["teacher"] > 0
    assert "teacher" not in second.clock.evaluations
    assert second.clock.stored == first.clock.evaluations["teacher"]
    without = worlds.trainer(tmp_path / "c", [NO_GAN, NO_DMD])
    without.train()
    assert worlds.equal(worlds.parameters(first), worlds.parameters(without))
    larger = ["train.batch_size=8", "train.budget.amount=32"]
    third, alone = cell("d", [NO_GAN, NO_DMD, *larger]), worlds.trainer(tmp_path / "e", [NO_GAN, NO_DMD, *larger])
    alone.train()
    assert "teacher" not in third.clock.evaluations and third.clock.images == first.clock.images
    assert worlds.distance(worlds.parameters(third), worlds.parameters(alone)) < 1e-5, "the problems are the same"


def test_wgan_clips_the_critic_after_each_update_and_nobody_else(tmp_path: Path) -> None:
    trained = worlds.trainer(tmp_path, [*ALWAYS, "method.adversarial_loss=wgan"])
    trained._iteration()
    largest = {name: max(p.abs().max().item() for p in player.parameters.values())
               for name, player in trained.players.items()}  # fmt: skip
    assert largest["critic"] == pytest.approx(0.01) and largest["student"] > 0.01


class OftenBusy(SolutionStore):
    """Somebody else is solving the first batch, until it has been asked for three times."""

    refusals = 3

    def fetch(self, positions: np.ndarray, compute: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        if positions[0] == 0 and self.refusals:
            self.refusals -= 1
            raise Busy
        return super().fetch(positions, compute)


def test_a_cell_that_would_wait_solves_what_lies_ahead(tmp_path: Path) -> None:
    store = OftenBusy(tmp_path / "store", {}, 32, (4, 8, 8))
    trained = worlds.trainer(tmp_path / "a", [NO_GAN, NO_DMD], solutions=store)
    trained._iteration()
    assert store.flags.tolist() == [1] * 16 + [0] * 16  # batches of 4: this one, and one ahead for each refusal
    ahead = trained.clock.ahead
    assert ahead > 0
    trained.train()
    assert trained.clock.stored == trained.clock.ahead == ahead
    without = worlds.trainer(tmp_path / "b", [NO_GAN, NO_DMD])
    without.train()
    assert worlds.equal(worlds.parameters(trained), worlds.parameters(without))
    assert trained.clock.evaluations["teacher"] + ahead == without.clock.evaluations["teacher"]


def test_the_teacher_is_solved_for_later_batches_too(tmp_path: Path) -> None:
    """In blocks of 12 that end with their stage (of 8), whose guided passes are one batch; nothing else changes."""
    store = SolutionStore(tmp_path / "store", {}, 32, (4, 8, 8))
    trained = worlds.trainer(tmp_path / "a", [NO_GAN, NO_DMD, "execution.solve_batch=12"], solutions=store)
    largest = {}  # batch of the teacher, by how many problems were solved before it
    network = trained.method.backbone.network

    def noting(role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if role == "teacher":
            solved = int(store.flags.sum())
            largest[solved] = max(largest.get(solved, 0), len(x_t))
        return network(role, x_t, t, cond)

    trained.method.backbone.network = noting
    trained._iteration()
    assert store.flags.tolist() == [1] * 8 + [0] * 24, "two batches of 4 end the stage"
    trained.train()
    assert largest == {0: 16, 8: 8, 12: 8, 16: 16, 24: 16}
    without = worlds.trainer(tmp_path / "b", [NO_GAN, NO_DMD])
    without.train()
    assert worlds.distance(worlds.parameters(trained), worlds.parameters(without)) < 1e-5
    assert trained.clock.ahead == trained.clock.stored == without.clock.evaluations["teacher"]
    logged = trained.run.metrics()[-1]
    assert logged["ahead_evaluations"] == logged["stored_evaluations"] == trained.clock.ahead
    assert trained.clock.amount == without.clock.amount


def test_at_full_noise_the_student_starts_from_pure_noise(tmp_path: Path) -> None:
    trained = worlds.trainer(tmp_path, ["method.timestep_distribution=sharp", *(f"method.{k}" for k in ())])
    trained.method.config.stage_weights = [[1.0, 0.0, 0.0, 0.0]] * 4
    rollout = one_rollout(trained)
    noise = trained.method.stream("student", "noise").normal(rollout.batch.positions, (4, 8, 8))
    assert rollout.t.tolist() == [999] * 4
    assert torch.equal(rollout.x_t, torch.from_numpy(noise))
