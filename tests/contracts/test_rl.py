"""The RL turn on a real tiny network: who has which turn, what it costs, what it changes, what stops it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import UserError, compose, from_yaml, run_id, to_yaml
from core.losses.preference import NoPreference
from core.training.loop import Diverged, Trainer
from core.training.preemption import Preempted
from tests import toy_rewards, worlds


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    with toy_rewards.registered():
        yield


FAST = ["method.student_lr=1e-3", "method.fake_score_lr=1e-3", "method.gan=off", "method.ttur=1"]
LEVEL = ["method.rl.reward=level", "method.rl.ratio=1"]


def trainer(folder: Path, *overrides: str, sharing: str = "lora", family: str = "unet") -> Trainer:
    return worlds.trainer(folder, [*FAST, *overrides], sharing, experiment="dmd2/tiny", family=family)


@pytest.mark.parametrize(
    ("ttur", "ratio", "distil", "turns"),
    [
        (1, 1, True, "DRDRDR"), (1, 2, True, "DRRDRR"), (2, 1, True, "D-R-D-R-"), (2, 5, True, "D-R-R-R-R-R-D-"),
        (1, 10, True, "DRRRRRRRRRRD"), (2, 5, False, "RRRRRR"),
    ],
)  # fmt: skip
def test_the_ratio_deals_out_the_students_turns(
    tmp_path: Path, ttur: int, ratio: int, distil: bool, turns: str
) -> None:
    """The fake score follows the student in every iteration; where nothing is distilled there is none."""
    settings = [f"method.ttur={ttur}", f"method.rl.ratio={ratio}", f"method.rl.distil={distil}"]
    trained = trainer(tmp_path, "method.rl.reward=level", *settings)
    seen = ""
    for _ in turns:
        names = [turn.name for turn in trained.method.turns(trained.clock)]
        assert ("fake_score" in names) == distil
        seen += "D" if "student" in names else "R" if "rl" in names else "-"
        assert trained.method.has_turn_of("student", trained.clock) == (seen[-1] != "-")
        trained.clock.advance()
    assert seen == turns


def test_without_a_weight_every_bit_is_dmd2s(tmp_path: Path) -> None:
    few = "train.budget.amount=3"
    plain, switched = trainer(tmp_path / "plain", few), trainer(tmp_path / "off", few, *LEVEL, "method.rl.weight=0")
    for trained in (plain, switched):
        trained.train()
    assert worlds.equal(worlds.parameters(plain), worlds.parameters(switched))
    assert plain.clock.evaluations == switched.clock.evaluations


def test_a_run_without_rl_keeps_its_id_and_a_stored_one_is_read() -> None:
    """Settings of a part that is off by default do not enter the id; one that is on enters whole."""
    config = compose("dmd2/tiny")
    config.backbone.weights_hash = config.data.data_hash = "known"
    before = run_id(config)
    stored = to_yaml(config).split("  rl:")[0] + to_yaml(config).split("max_distance: 0.0\n")[1]
    assert "rl:" not in stored and run_id(from_yaml(stored)) == before
    ids = {before}
    for overrides in (["method.rl.reward=level"], ["method.rl.reward=level", "method.rl.beta=100"]):
        other = compose("dmd2/tiny", overrides)
        other.backbone.weights_hash = other.data.data_hash = "known"
        assert run_id(from_yaml(to_yaml(other))) == run_id(other)
        ids.add(run_id(other))
    assert len(ids) == 3


@pytest.mark.parametrize(("reward", "more"), [("level", {}), ("brightness", {"student": 16, "reward_model": 16})])
def test_the_evaluations_of_a_turn_are_counted(tmp_path: Path, reward: str, more: dict[str, int]) -> None:
    """Student: the simulation to x_t and the call there; reference: one. A reward on pictures needs the student's
    prediction from each of the four candidates, and is itself called for each.
    """
    trained = trainer(tmp_path, f"method.rl.reward={reward}", "method.rl.distil=false")
    simulated = int(trained.method.rl._steps(trained.clock.positions()).sum())
    trained._iteration()
    expected = {"student": simulated + 4, "reference": 4}
    found = dict(trained.clock.evaluations)
    assert found == {name: expected.get(name, 0) + more.get(name, 0) for name in expected | more}


@pytest.mark.parametrize(
    ("reward", "sharing", "family"),
    [("level", "lora", "unet"), ("level", "full", "unet"), ("level", "lora", "flux2"), ("brightness", "lora", "unet")],
)
def test_rl_raises_its_reward_and_moves_the_student_alone(
    tmp_path: Path, reward: str, sharing: str, family: str
) -> None:
    """On one base p_ref is an adapter: there is no second network."""
    trained = trainer(
        tmp_path, f"method.rl.reward={reward}", "method.rl.distil=false", "method.rl.clamp=0", "method.student_lr=3e-3",
        "method.rl.beta=200", sharing=sharing, family=family,
    )  # fmt: skip
    backbone = trained.method.backbone
    assert len(backbone.networks()) == (1 if sharing == "lora" else 3)
    before = worlds.parameters(trained)
    rewards = [line["rl/reward"] for line in _lines(trained, 5)]
    after = worlds.parameters(trained)
    changed = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"student"} and rewards[-1] > rewards[0]


def _lines(trained: Trainer, iterations: int) -> list[dict[str, float]]:
    """What is told of each iteration, always on the prompts and noises of the first one."""
    lines = []
    for _ in range(iterations):
        trained._iteration()
        lines.append(trained.monitor.flush())
        trained.clock.iteration = trained.clock.images = trained.clock.student_images = 0
    return lines


def test_rewards_of_the_direct_gradient_rise_too(tmp_path: Path) -> None:
    for reward in ("level", "brightness"):
        options = [f"method.rl.reward={reward}", "method.rl.distil=false", "method.rl.objective=reward_gradient"]
        trained = trainer(tmp_path / reward, *options)
        assert "reference" not in trained.method.backbone.roles
        rewards = [line["rl/reward"] for line in _lines(trained, 4)]
        assert rewards == sorted(rewards) and rewards[-1] > rewards[0]


def test_a_stopped_run_ends_with_the_same_bits_whatever_its_reference_was(tmp_path: Path) -> None:
    """p_ref is the student at the start of the run, from some parent: nothing but the state knows it."""
    both = [*LEVEL, "train.ema_decay=0.9", "train.budget.amount=5"]

    def started(name: str, *more: str) -> Trainer:
        made = trainer(tmp_path / name, *both, *more)
        if made.clock.iteration == 0:  # as train.init_from would
            with torch.no_grad():
                for role in ("student", "reference", "student_ema"):
                    for value in made.method.backbone.role_parameters(role).values():
                        value.fill_(0.01)
        return made

    whole = started("whole")
    whole.train()
    distances = [line["rl/distance_to_reference"] for line in whole.run.metrics() if "rl/preference" in line]
    assert 0 < distances[0] < distances[-1]
    for stop in (4, 12):
        with pytest.raises(Preempted):
            started("cut", f"execution.stop_after_images={stop}").train()
    resumed = started("cut")
    assert resumed.clock.iteration == 3
    resumed.train()
    assert worlds.equal(worlds.parameters(whole), worlds.parameters(resumed))
    assert resumed.clock.evaluations == whole.clock.evaluations


def test_rl_goes_together_with_flash_dmds_first_stage(tmp_path: Path) -> None:
    """Turns of either kind move the student, each takes the fake score along, p_ref stays where the run began."""
    settings = [*LEVEL, "method.ttur=1", "train.budget.amount=2", "method.student_lr=1e-3", "method.fake_score_lr=0"]
    trained = worlds.trainer(tmp_path, [*settings, "method.score_ema_decay=0.5"], experiment="flash_dmd/tiny")
    states = [worlds.parameters(trained)]
    for _ in trained.iterations():
        states.append(worlds.parameters(trained))

    def moved(role: str, before: int) -> bool:
        keys = [key for key in states[0] if key.startswith(f"{role}/")]
        assert keys, role
        return any((states[before][key] != states[before + 1][key]).any() for key in keys)

    assert [[moved(role, step) for step in range(2)] for role in ("student", "fake_score", "reference")] == [
        [True, True], [True, True], [False, False],
    ]  # fmt: skip


def test_another_micro_batch_gives_the_same_curve(tmp_path: Path) -> None:
    whole, split = (
        trainer(tmp_path / str(n), *LEVEL, f"execution.micro_batch={n}", "train.budget.amount=3") for n in (4, 2)
    )
    whole.train()
    split.train()
    for a, b in zip(whole.run.metrics(), split.run.metrics(), strict=True):
        for term in ("student/dmd", "fake_score/denoise", "rl/preference", "rl/reward", "rl/gap", "rl/agreement"):
            if term in a:
                assert a[term] == pytest.approx(b[term], rel=1e-3), term
    assert "rl/preference" in whole.run.metrics()[1] and whole.clock.evaluations == split.clock.evaluations


@pytest.mark.parametrize(("noise", "steps"), [("high", {0, 1}), ("all", {0, 1, 2})])
def test_pairs_begin_at_high_noise_or_at_each_step_that_draws(tmp_path: Path, noise: str, steps: set[int]) -> None:
    method = trainer(tmp_path, *LEVEL, f"method.rl.noise={noise}").method
    assert set(method.rl._steps(np.arange(64)).tolist()) == steps
    assert method.timesteps[:2].tolist() == [999, 749]


def test_candidates_are_the_samplers_own_next_states(tmp_path: Path) -> None:
    """Of one x0, with noises of their own; another number of them moves none."""
    four, two = (trainer(tmp_path / str(k), *LEVEL, f"method.rl.num_candidates={k}").method.rl for k in (4, 2))
    x0, t = torch.randn(3, 4, 8, 8), torch.full((3,), 749)
    found, fewer = (rl._candidates(x0, t, np.arange(3)) for rl in (four, two))
    assert found.shape == (3, 4, 4, 8, 8) and torch.equal(found[:, :2], fewer)
    alpha, sigma = four.backbone.process.alpha_sigma(t)
    noise = (found - (alpha * x0)[:, None]) / sigma[:, None]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs(torch.corrcoef(noise.flatten(2).transpose(0, 1).flatten(1))[0, 1:]).max() < 0.15


def test_a_pair_that_is_too_close_teaches_nothing(tmp_path: Path) -> None:
    trained = trainer(tmp_path, *LEVEL, "method.rl.min_gap=1e6", "method.rl.distil=false", "method.weight_decay=0")
    before = worlds.parameters(trained)
    (line,) = _lines(trained, 1)
    assert line["rl/pairs"] == 0 and line["rl/preference"] == 0 and line["rl/gap"] > 0
    assert worlds.equal(before, worlds.parameters(trained))


def test_a_student_that_leaves_its_reference_ends_the_run_by_a_setting(tmp_path: Path) -> None:
    """Nothing is thrown away: the distance that ended it is in the log."""
    options = [*LEVEL, "method.rl.distil=false", "method.student_lr=1e-2"]
    trained = trainer(tmp_path, *options, "method.rl.max_distance=1e-6")
    with pytest.raises(Diverged, match="is beyond method.rl.max_distance=1e-06: the reward may be hacked, after 8 im"):
        trained.train()
    distances = [line["rl/distance_to_reference"] for line in trained.run.metrics()]
    assert distances[0] == 0 and distances[1] > 1e-6 and len(distances) == 2


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        ("broken", "method.rl.reward=broken: 1 of 16 rewards are not finite"),
        ("saturated", "method.rl.reward=saturated: all 16 rewards are 1; a constant prefers nothing"),
    ],
)
def test_a_reward_that_teaches_nothing_stops_the_run(tmp_path: Path, reward: str, line: str) -> None:
    with pytest.raises(NoPreference, match=line) as error:
        trainer(tmp_path, f"method.rl.reward={reward}", "method.rl.distil=false").train()
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["method.rl.reward=lrn"], "method.rl.reward=lrn is unknown; allowed: off, lrm, "),
        (["method.rl.reward=level", "method.num_steps=1"], "method.num_steps=1 draws no next state"),
        (["method.rl.clamp=1"], "method.rl.clamp=1 is out of range; allowed: between 0 and 0.99"),
        (["method.rl.num_candidates=1"], "method.rl.num_candidates=1 is out of range; allowed: at least 2"),
        (["method.rl.betta=1"], "unknown key 'method.rl.betta'; nearest: method.rl.beta"),
    ],
)
def test_wrong_settings_are_told_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        compose("dmd2/tiny", overrides)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
