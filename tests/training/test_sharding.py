"""Two gloo processes, sharded (FSDP2) and replicated, against one: curves, resume, unequal work, gradients."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.config import UserError
from core.methods.base import total
from core.run import Run, find_runs
from core.training import checkpoint
from core.training.loop import Trainer
from core.training.preemption import Preempted
from core.training.sharding import DTensor, own_part, whole
from core.training.world import ALONE, World, check_processes
from tests import worlds

FSDP = "execution.sharding=fsdp"
DMD2 = [
    "method.num_steps=2", "method.gan=bottleneck", "method.adversarial_weight=0.1", "method.fake_score_lr=1e-3",
    "train.budget.amount=50", "train.batch_size=8", "execution.log_every_images=8", "train.ema_decay=0.9",
]  # fmt: skip


def training(
    folder: Path, *overrides: str, experiment: str = "dmd2/tiny", sharing: str = "lora", family: str = "flux2"
) -> Callable[[World], None]:
    """What each process does: train, and write the weights to use."""

    def work(world: World) -> None:
        trained = worlds.trainer(folder, overrides, sharing, experiment=experiment, world=world, family=family)
        try:
            trained.train()
            trained.snapshot()
        except Preempted:
            return

    return work


def run_in(folder: Path) -> Run:
    return Run.open(next(iter(find_runs(folder / "runs"))))


def agree(ours: Run, theirs: Run, rtol: float = 1e-5) -> None:
    """The same curve of every loss term and gradient norm, and the same weights."""
    lines = list(zip(ours.metrics(), theirs.metrics(), strict=True))
    assert len(lines) >= 6
    for one, other in lines:
        names = [key for key in other if "/" in key and "latent_mean" not in key]  # a mean around 0 is not relative
        assert len(names) >= 3 and {key for key in one if "/" in key} == {key for key in other if "/" in key}
        for key in names:  # a gradient adds up the rounding of a whole network twice
            assert one[key] == pytest.approx(other[key], rel=10 * rtol if "grad_norm" in key else rtol), key
    files = [next(run.path.glob("snapshots/*/student.safetensors")) for run in (ours, theirs)]
    one, other = (load_file(file) for file in files)
    assert one.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("alone")
    training(folder, *DMD2)(World())
    return run_in(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[FSDP], [FSDP, "execution.micro_batch=1"], [], ["execution.micro_batch=1"]],
    ids=["fsdp", "fsdp, 4 micro-batches", "replicated", "replicated, 4 micro-batches"],
)
def test_two_processes_give_the_curve_of_one(alone: Run, tmp_path: Path, options: list[str]) -> None:
    """In fp32, over 50 iterations; half of the samples need a call of the network more than the others."""
    worlds.together(tmp_path, training(tmp_path, *DMD2, *options))
    run = run_in(tmp_path)
    assert run.id == alone.id and run.metrics()[-1]["images"] == 400
    agree(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[FSDP], []], ids=["fsdp", "replicated"])
def test_three_copies_of_a_unet_give_the_curve_of_one_process(tmp_path: Path, options: list[str]) -> None:
    kind, rates = {"sharing": "full", "family": "unet"}, ["method.student_lr=2e-5", "method.fake_score_lr=2e-5"]
    training(tmp_path / "one", *DMD2, *rates, **kind)(World())
    worlds.together(tmp_path / "two", training(tmp_path / "two", *DMD2, *rates, *options, **kind))
    agree(run_in(tmp_path / "two"), run_in(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_critics_and_teacher_solutions_are_sharded_too(tmp_path: Path, sharing: str) -> None:
    """Half a network's forward (features), active sets of the teacher's solver of unequal lengths."""
    flash = ["method.adversarial_weight=[.1,.1,.1,.1]", "method.dmd_weight=[.3,.3,.3,.3]", "train.batch_size=8"]
    common = [*flash, "train.budget.amount=48", "execution.log_every_images=8", "method.num_timesteps=4"]
    options = {"experiment": "flash/tiny", "sharing": sharing, "family": "unet"}
    training(tmp_path / "one", *common, **options)(World())
    worlds.together(tmp_path / "two", training(tmp_path / "two", *common, FSDP, **options))
    agree(run_in(tmp_path / "two"), run_in(tmp_path / "one"), rtol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone: Run, tmp_path: Path) -> None:
    """Two processes in parts, four, one that holds everything, then two in parts again: one curve."""
    pair = [*DMD2, FSDP]
    for processes, images in ((2, 80), (4, 160)):
        work = training(tmp_path, *pair, f"execution.stop_after_images={images}")
        worlds.together(tmp_path / str(processes), work, processes)
        state = max(tmp_path.glob("runs/*/*/*/state/0*"))
        parts = {file.name for file in state.glob("*.safetensors")}
        assert len(parts) == processes and set(json.loads((state / "COMPLETE").read_text())) == parts
    training(tmp_path, *DMD2, "execution.stop_after_images=240")(World())
    worlds.together(tmp_path / "again", training(tmp_path, *pair))
    run = run_in(tmp_path)
    assert len(list(run.path.glob("attempts/*"))) == 4
    agree(run, alone)


@pytest.mark.slow
def test_a_part_that_is_damaged_falls_back_to_the_state_before(alone: Run, tmp_path: Path) -> None:
    pair = [*DMD2, FSDP, "execution.checkpoint_every_images=80"]
    worlds.together(tmp_path, training(tmp_path, *pair, "execution.stop_after_images=160"))
    newest = max(tmp_path.glob("runs/*/*/*/state/0*"))
    part = max(newest.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    (newest.parent / ".parts-0000000040").mkdir()  # of processes that died while they wrote
    worlds.together(tmp_path / "again", training(tmp_path, *pair))
    agree(run_in(tmp_path), alone)
    assert (newest.parent / f"corrupt-{newest.name}").is_dir() and not list(newest.parent.glob(".parts-*"))


@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_each_process_holds_its_part(tmp_path: Path, sharing: str) -> None:
    """Parameters, average and moments in memory, each its own; the frozen base as well."""

    def work(world: World) -> None:
        trained = worlds.trainer(tmp_path, [*DMD2, FSDP], sharing, experiment="dmd2/tiny", world=world, family="flux2")
        backbone = trained.method.backbone
        before = [parameter.to_local().clone() for parameter in backbone.role_parameters("teacher").values()]
        trained._iteration()
        after = [parameter.to_local() for parameter in backbone.role_parameters("teacher").values()]
        assert all(map(torch.equal, before, after)), "copies have had their memory in common until now"
        for role in ("student", "fake_score", "student_ema", "teacher"):
            parameters = backbone.role_parameters(role).values()
            held = sum(parameter.to_local().numel() for parameter in parameters)
            assert held < 0.6 * sum(parameter.numel() for parameter in parameters), role
        for player in trained.players.values():
            for part in player.parts:
                assert player.optimizer.state[part]["exp_avg"].shape == part.shape
                assert not part.requires_grad or part.is_leaf

    worlds.together(tmp_path, work)


@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_a_picture_on_the_way_leaves_nothing_gathered(tmp_path: Path, sharing: str) -> None:
    """What a network computes and what is stored of it follow the average after a sheet was drawn, too."""

    def work(world: World) -> None:
        settings = [*DMD2, FSDP, "train.precision=bf16"]
        trained = worlds.trainer(tmp_path, settings, sharing, experiment="dmd2/tiny", world=world, family="flux2")
        trained.method.backbone.compute_dtype = torch.bfloat16
        batch, t, drawn = trained.data.batch(world.share(trained.clock.positions())), torch.full((4,), 900.0), []
        for _ in range(2):
            trained._iteration()
            averages = trained.method.backbone.role_parameters("student_ema")
            with torch.no_grad():
                for average in averages.values():
                    own_part(average).add_(0.05)
                drawn.append(trained.method.backbone.predict("student_ema", batch.x0, t, batch.cond))
            found = trained.method.backbone.role_parameters("student_ema")
            assert all(found[name] is average for name, average in averages.items())
        assert (drawn[1] - drawn[0]).abs().max() > 1e-3

    worlds.together(tmp_path, work)


@pytest.mark.parametrize(("state_dtype", "sharing"), [("bf16", "full"), ("bf16_stochastic", "lora")])
def test_bf16_states_are_sharded_and_stay_so(tmp_path: Path, state_dtype: str, sharing: str) -> None:
    """Three iterations, of which the last goes on from a state; shards of one parameter are rounded on their own.

    The critic, a head that each process holds whole, is rounded alike.
    """
    options = [*DMD2, FSDP, f"train.state_dtype={state_dtype}", "train.budget.amount=3"]

    def train(world: World, *more: str) -> Trainer:
        settings = [*options, *more]
        trained = worlds.trainer(tmp_path, settings, sharing, experiment="dmd2/tiny", world=world, family="flux2")
        with contextlib.suppress(Preempted):
            trained.train()
        return trained

    def work(world: World) -> None:
        train(world, "execution.stop_after_images=16")
        trained, heads = train(world), []
        for name, player in trained.players.items():
            assert {part.dtype for part in player.parts} == {torch.bfloat16}
            states = [player.optimizer.state[part] for part in player.parts]
            moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
            assert {moment.dtype for moment in moments} == {torch.bfloat16}
            assert all(tensor.isfinite().all() for tensor in (*player.parts, *moments))
            assert any(moment.any() for moment in moments)
            updates = {"student": 2, "fake_score": 3}[name]
            assert {state["step"].item() for state in states} == {updates}
            if state_dtype == "bf16_stochastic":
                assert {state["draws"].item() for state in states} == {updates}
                for part, parameter, key in zip(player.parts, player.trained, player.optimizer.keys, strict=True):
                    assert (key[-1] == world.rank) == isinstance(parameter, DTensor)
                    if not isinstance(parameter, DTensor):
                        heads.append(part)
        sums = [head.double().sum().item() for head in heads]
        shared = world.total({str(index): value for index, value in enumerate(sums)})
        assert [shared[str(index)] for index in range(len(sums))] == [2 * value for value in sums]
        assert len(heads) == {"bf16": 0, "bf16_stochastic": len(list(trained.method.critic.parameters()))}[state_dtype]

    worlds.together(tmp_path, work)
    lines = run_in(tmp_path).metrics()
    assert [line["images"] for line in lines] == [8, 16, 24]
    assert all(math.isfinite(value) for line in lines for key, value in line.items() if "/" in key)


def gradients(folder: Path, family: str, sharing: str, *options: str, world: World = ALONE) -> dict[str, torch.Tensor]:
    """Of the student's turn, another role having run between its forward and its backward pass; whole."""
    settings = ["train.batch_size=8", "method.dmd_weight=0", "method.adversarial_weight=1", *options]
    trained = worlds.trainer(folder, settings, sharing, experiment="dmd2/tiny", world=world, family=family)
    backbone, clock = trained.method.backbone, trained.clock
    worlds.move_apart(backbone)
    rollout = trained.method.rollout(trained.data.batch(world.share(clock.positions())), clock)
    terms = trained.method.losses("student", rollout, clock)
    with torch.no_grad():
        for role in ("teacher", "fake_score"):
            backbone.predict(role, rollout.x_t, rollout.t, rollout.batch.cond)
    total(terms, trained.method.weights("student", clock)).backward()
    found = {name: p.grad for name, p in backbone.role_parameters("student").items()}
    if not trained.sharded:
        world.average(found.values())
    return {name: whole(gradient) for name, gradient in found.items()}


@pytest.mark.parametrize(("family", "sharing"), [("flux2", "lora"), ("unet", "full")])
def test_checkpointed_activations_give_the_same_gradients(tmp_path: Path, family: str, sharing: str) -> None:
    """The loss goes through two roles (the student's sample, the fake score's features), on one process and on two."""
    plain = gradients(tmp_path / "plain", family, sharing)
    again = gradients(tmp_path / "again", family, sharing, "execution.activation_checkpointing=true")
    size = max(gradient.abs().max() for gradient in plain.values())
    assert size > 1e-6 and plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert (again[name] - gradient).abs().max() < 1e-6 * size, name

    def work(world: World) -> None:
        kept = gradients(tmp_path / "kept", family, sharing, FSDP, world=world)
        options = [FSDP, "execution.activation_checkpointing=true"]
        for name, gradient in gradients(tmp_path / "fsdp", family, sharing, *options, world=world).items():
            assert (gradient - kept[name]).abs().max() < 1e-6 * size, name
            assert (gradient - plain[name]).abs().max() < 2e-6 * size, name

    worlds.together(tmp_path / "pair", work)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sharing"), [("flux2", "lora"), ("unet", "full")])
def test_compiled_blocks_may_be_checkpointed_and_sharded(tmp_path: Path, family: str, sharing: str) -> None:
    plain = gradients(tmp_path / "plain", family, sharing)
    size = max(gradient.abs().max() for gradient in plain.values())
    options = ["execution.compile=aot_eager", "execution.activation_checkpointing=true"]

    def work(world: World) -> None:
        importlib.import_module("torch._dynamo").config.fail_on_recompile_limit_hit = True  # named, it is pickled
        found = gradients(tmp_path / "compiled", family, sharing, FSDP, *options, world=world)
        for name, gradient in found.items():
            assert (gradient - plain[name]).abs().max() < 1e-5 * size, name

    worlds.together(tmp_path / "pair", work)


@pytest.mark.parametrize(("number", "options"), [(signal.SIGTERM, []), (signal.SIGUSR2, [FSDP])])
def test_a_signal_to_one_process_stops_all_with_one_state(
    tmp_path: Path, number: signal.Signals, options: list[str]
) -> None:
    """Nobody leaves before the state is complete, however long that takes: a launcher kills those who leave late."""

    def work(world: World) -> None:
        settings = [*DMD2, *options]
        trained = worlds.trainer(tmp_path, settings, experiment="dmd2/tiny", world=world, family="flux2")
        iteration, hashed = trained._iteration, checkpoint._hash

        def slowly(file: Path) -> str:
            time.sleep(0.5)
            return hashed(file)

        def interrupted() -> None:
            if world.rank == 1 and trained.clock.images == 8:
                signal.raise_signal(number)
            iteration()

        trained._iteration, checkpoint._hash = interrupted, slowly
        with pytest.raises(Preempted, match="stopped at 16 images"):
            trained.train()
        assert (trained.run.path / "state" / "0000000016" / "COMPLETE").exists()

    worlds.together(tmp_path, work)
    assert [state.name for state in (run_in(tmp_path).path / "state").iterdir()] == ["0000000016"]
    resumed = worlds.trainer(tmp_path, DMD2, experiment="dmd2/tiny", family="flux2")
    assert resumed.clock.images == 16 and resumed.clock.evaluations["student"] > 0


def test_sharded_networks_are_measured_at_the_end(tmp_path: Path) -> None:
    config = worlds.config(tmp_path, FSDP, "eval.at=[0.5,1.0]")
    with pytest.raises(UserError, match="sharded networks are measured at the end; allowed: \\[1.0\\]"):
        check_processes(config, 2)
