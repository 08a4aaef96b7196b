"""What every method keeps, on every kind of backbone and both kinds of sharing, toys of a user's own among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.backbones.base import PARENT, Backbone
from core.data.solutions import SolutionStore
from core.diffusion.solvers import solve
from core.identity import teacher_problem
from core.methods.clock import Clock
from core.training.loop import Trainer
from core.training.preemption import Preempted
from tests import worlds
from tests.contracts import toys


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    with toys.forgotten_afterwards():
        toys.register()
        yield


# Settings under which every term and every kind of player is there, and runs of 8 iterations
METHODS = {
    "flash": ["method.adversarial_weight=[.1,.1,.1,.1]", "method.dmd_weight=[.3,.3,.3,.3]"],
    "dmd2": ["method.fake_score_lr=1e-3"],
    "dmd2, critic on images": ["method.gan=effnet_lite1"],
    "flash_dmd": ["method.fake_score_lr=1e-3", "method.adversarial_ratio=0.5", "method.critic_crop=32"],
    "flash_dmd, critic on the score": ["method.gan=bottleneck", "method.num_low_noise_steps=2"],
    "lcm": ["method.guidance_max=9"],
    "progressive": ["method.guidance_max=9", "method.adversarial_weight=0.1", "method.critic_lr=1e-3"],
    "progressive, a later round": ["method.teacher=parent", "method.prediction=v", "method.null_prob=0.5"],
    "guidance": ["method.weighting=v"],
    "guidance, steps first": ["method.teacher=parent", "method.num_timesteps=4"],
    "toy_two_turns": ["method=toy_two_turns"],
    "toy_reward": ["method=toy_reward"],
    "toy_round": ["method=toy_round", "method.adversarial_weight=[.1,.1,.1,.1]"],
}
COMMON = ["train.ema_decay=0.9", "train.budget.amount=8", "train.budget.unit=iterations", "method.student_lr=1e-3"]


def trainer(folder: Path, method: str, sharing: str = "lora", family: str = "unet", *more: str) -> Trainer:
    ours = method.split(",")[0]
    own = ("dmd2", "flash_dmd", "lcm", "progressive", "guidance")
    experiment = f"{ours}/tiny" if ours in own else "flash/tiny"
    return worlds.trainer(folder, [*METHODS[method], *COMMON, *more], sharing, experiment=experiment, family=family)


def fixed(trained: Trainer) -> dict[str, Tensor]:
    """The base and every frozen role that follows nobody, cloned."""
    frozen = [role.name for role in trained.method.roles() if not role.trainable and role.follows is None]
    backbone = trained.method.backbone
    return {
        f"{role}/{name}": value.detach().clone()
        for role in ("teacher", *frozen)
        for name, value in backbone.role_parameters(role).items()
    }


def combinations() -> list[tuple[str, str, str]]:
    """Every method on every family; what is a toy or another critic on one of each kind of network."""
    found = []
    for method in METHODS:
        for family in sorted(worlds.WRITERS) if method in ("flash", "dmd2", "lcm") else ("unet", "flux2"):
            found += [(method, sharing, family) for sharing in ("lora", "full")]
    return found


@pytest.mark.parametrize(("method", "sharing", "family"), combinations())
def test_every_method_keeps_the_contract(tmp_path: Path, method: str, sharing: str, family: str) -> None:
    trained = trainer(tmp_path, method, sharing, family)
    before_all = fixed(trained)
    _check_declarations(trained)
    for _ in range(trained.config.method.period):
        rollouts = [trained.method.rollout(trained.data.batch(trained.clock.positions()), trained.clock)]
        for turn in trained.method.turns(trained.clock):
            terms = trained.method.weights(turn.name, trained.clock)
            before = worlds.parameters(trained)
            trained._turn(turn, rollouts)
            after = worlds.parameters(trained)
            changed = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
            followers = {role.name for role in trained.method.roles() if role.follows == turn.player}
            assert turn.player in changed and changed <= {turn.player, *followers}, turn
            assert not any(tensor.requires_grad for tensor in worlds.tensors(rollouts[0]).values())
            logged = {name.split("/")[1] for name in trained.monitor._sums if name.startswith(f"{turn.name}/")}
            assert logged - {"grad_norm"} <= {name for name, weight in terms.items() if weight}
        trained.clock.advance()
    assert sum(trained.method.backbone.evaluations.values()) > 0
    after_all = fixed(trained)
    assert all(torch.equal(after_all[name], value) for name, value in before_all.items())


def _check_declarations(trained: Trainer) -> None:
    """Roles, players, turns and the schema agree with each other."""
    method, config = trained.method, trained.config.method
    players = {player.name: player for player in method.players()}
    trainable = {role.name for role in method.roles() if role.trainable}
    assert {player.role for player in players.values() if player.role is not None} == trainable
    due = []
    for iteration in range(2 * config.period):
        clock = Clock(100, "iterations", 4, iteration=iteration)
        assert {turn.player for turn in method.turns(clock)} <= set(players)
        due.append(method.has_turn_of(config.learner, clock))
    assert due[: config.period] == due[config.period :] and sum(due) == 2
    for file in config.weight_files:
        for name in (file.path, file.hash or file.path):
            part, _, leaf = name.rpartition(".")
            owner = getattr(config, part) if part else config
            assert leaf in {item.name for item in dataclasses.fields(owner)}


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, method: str) -> None:
    whole = trainer(tmp_path / "whole", method)
    whole.train()
    with pytest.raises(Preempted):
        trainer(tmp_path / "cut", method, "lora", "unet", "execution.stop_after_images=20").train()
    resumed = trainer(tmp_path / "cut", method)
    assert resumed.clock.images == 20
    resumed.train()
    assert worlds.equal(worlds.parameters(whole), worlds.parameters(resumed))
    assert resumed.clock.evaluations == whole.clock.evaluations


def test_a_frozen_reference_is_part_of_the_state(tmp_path: Path) -> None:
    """Of the student at some moment of the training: nothing but the state knows it."""
    first = trainer(tmp_path, "toy_two_turns")
    for parameter in first.method.backbone.role_parameters(toys.REFERENCE).values():
        parameter.data.fill_(0.125)
    first._iteration()
    first.save()
    resumed = trainer(tmp_path, "toy_two_turns")
    assert resumed.clock.iteration == 1
    for name, parameter in resumed.method.backbone.role_parameters(toys.REFERENCE).items():
        assert (parameter == 0.125).all(), name


def test_two_turns_step_one_player_by_different_losses(tmp_path: Path) -> None:
    """The optimizer steps twice, the average of the student moves twice, each curve has a name of its own."""
    trained = trainer(tmp_path, "toy_two_turns", "lora", "unet", "execution.log_every_images=8")
    name = next(n for n in trained.players["student"].parameters if "lora_B" in n)
    score = trained.method.backbone.role_parameters(toys.SCORE)[name]
    start, before = trained.players["student"].parameters[name].detach().clone(), score.detach().clone()
    trained._turn(trained.method.turns(trained.clock)[0], [trained.ahead.rollout(trained.data.batch([0, 1]))])
    moved = trained.players["student"].parameters[name].detach()
    torch.testing.assert_close(score.detach(), 0.5 * before + 0.5 * moved)
    assert not torch.equal(moved, start)
    trained.train()
    steps = {state["step"].item() for state in trained.players["student"].optimizer.state.values()}
    assert steps == {1 + 2 * 4}, "two of each second iteration of eight, and the one above"
    assert {"towards/distance", "away/distance", "score/distance"} <= trained.run.metrics()[0].keys()


def test_a_reward_model_has_no_student(tmp_path: Path) -> None:
    """Its budget counts what it has seen itself, and it learns."""
    more = ["train.budget.unit=images", "train.budget.amount=40", "method.student_lr=1e-2"]
    trained = trainer(tmp_path, "toy_reward", "lora", "unet", *more)
    trained.train()
    losses = [line["reward_model/pairs"] for line in trained.run.metrics()]
    assert trained.clock.iteration == 10 and losses[-1] < losses[0]
    assert "student" not in trained.method.backbone.roles
    trained.snapshot()
    (snapshot,) = (trained.run.path / "snapshots").iterdir()
    assert [file.name for file in snapshot.iterdir()] == ["reward_model.safetensors"]


def test_a_second_round_reads_its_own_solutions(tmp_path: Path) -> None:
    """Same base, same problems, another parent: another store. Its solutions are the parent's."""
    config = worlds.config(tmp_path, *METHODS["toy_round"])
    stores = []
    for parent in ("a" * 10, "b" * 10, "a" * 10):
        config.train.parent = parent
        stores.append(SolutionStore(tmp_path / "solutions", teacher_problem(config), 4, (4, 8, 8)).path)
    assert stores[0] == stores[2] != stores[1]
    trained = trainer(tmp_path, "toy_round")
    batch = trained.data.batch(trained.clock.positions())
    of_the_base = trained.method.rollout(batch, trained.clock).target
    with torch.no_grad():
        for parameter in trained.method.backbone.role_parameters(PARENT).values():
            parameter += 0.05
    of_the_parent = trained.method.rollout(batch, trained.clock)
    assert not torch.equal(of_the_parent.target, of_the_base)
    with torch.no_grad():
        for name, parameter in trained.method.backbone.role_parameters("student").items():
            parameter.copy_(trained.method.backbone.role_parameters(PARENT)[name])

    def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return trained.method.backbone.guided("student", x, t, batch.cond[rows], batch.null, 8.0)

    trained.method.config.guidance_min = trained.method.config.guidance_max = 8.0
    target = trained.method.rollout(batch, trained.clock).target
    index = trained.method._starts(batch.positions, trained.method.pmf(trained.clock))
    expected = solve(denoise, of_the_parent.x_t, index, trained.method.timesteps, trained.method.backbone.process,
                     "dpmpp_2m")[0]  # fmt: skip
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("method", ["toy_two_turns", "toy_round"])
def test_the_weights_of_init_from_reach_every_role_like_the_student(tmp_path: Path, method: str) -> None:
    """A reference and a parent start as the student does, and the base stays who it was."""

    def load(backbone: Backbone, role: str) -> None:
        for parameter in backbone.role_parameters(role).values():
            parameter.data.fill_(0.25)

    made = trainer(tmp_path, method).method
    config, backbone = made.config, worlds.backbone(tmp_path)
    teacher = [value.clone() for value in backbone.role_parameters("teacher").values()]
    fresh = type(made)(config, backbone, seed=0, ema_decay=0.9, initial={"student": load})
    for role in fresh.roles():
        if role.like == "student":
            assert all((value == 0.25).all() for value in backbone.role_parameters(role.name).values()), role
    assert all(map(torch.equal, teacher, backbone.role_parameters("teacher").values()))
