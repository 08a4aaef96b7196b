"""The only training loop: rollouts, turns, checkpoints. Methods, backbones and data plug in through their contracts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file

from core.config import ExperimentConfig, UserError
from core.data.batches import LatentData
from core.methods.base import Method, Rollout, Turn, total
from core.methods.clock import Clock
from core.run import Run
from core.training.ahead import Ahead
from core.training.averages import Averages
from core.training.checkpoint import MERGED, SINGLE, Checkpoints, names_in, read_parts, save_snapshot
from core.training.compiling import Compiler
from core.training.monitor import Monitor
from core.training.player import TrainedPlayer
from core.training.preemption import Preempted, PreemptionFlag
from core.training.sharding import own_part, part_of, prepare, synchronise_gradients
from core.training.world import ALONE, World, is_sharded

MAX_SKIPPED_IN_ROW = 20


class Diverged(Exception):  # noqa: N818  a result, not a crash
    """A player's gradients were not finite for many updates in a row, or the method saw a reason to stop."""


class Trainer:
    """Trains one run; ``sheet(images seen)`` (optional) draws the fixed prompts at the current weights.

    It returns the file that it has written, None in the processes that write none. ``flag``: that of all trainings in
    this process, where there are several.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        method: Method,
        data: LatentData,
        run: Run,
        clock: Clock,
        attempt: int,
        sheet: Callable[[int], Path | None] | None = None,
        world: World = ALONE,
        flag: PreemptionFlag | None = None,
    ) -> None:
        self.config, self.method, self.data, self.run, self.clock, self.sheet = config, method, data, run, clock, sheet
        self.world = world
        self.micro_batch = micro_batch(config, world.size)
        backbone = method.backbone
        self.compiler = Compiler(config, backbone, world)
        prepare(backbone, config.execution, world)
        self.sharded = is_sharded(config.execution, world.size)
        settings = (config.train.max_grad_norm, config.train.state_dtype, (config.seed,))
        self.players = {player.name: TrainedPlayer(player, *settings) for player in method.players()}
        self.averages = Averages(backbone, method.roles())
        self.ahead = Ahead(method, data, clock, self.micro_batch, config.execution.solve_batch, world)
        self.checkpoints = Checkpoints(run.path / "state", config.execution.keep_checkpoints, world)
        self.flag = flag or PreemptionFlag()
        self._saved_at: int | None = None  # images
        self._resume()
        self.monitor = Monitor(run, clock, attempt, config.execution.heartbeat_s, config.execution.report_to, world)

    def train(self, until: float = 1.0) -> None:
        """Train to the fraction ``until`` of the budget; raises Preempted (state saved) or Diverged."""
        for _ in self.iterations(until):
            pass

    def iterations(self, until: float = 1.0) -> Iterator[None]:
        """``train`` that pauses after each iteration: others may train in between."""
        self.method.backbone.merge_again()
        with self.flag.watching():
            while not self.clock.done and self.clock.fraction < until:
                started = time.perf_counter()
                self._iteration()
                seconds = time.perf_counter() - started
                self.clock.seconds += seconds
                self.compiler.after(seconds, self.clock.fraction)
                self._after_iteration()
                yield
                if not self.clock.done and self._must_stop():
                    self.leave()

    def leave(self) -> NoReturn:
        """Save the state of this position, unless it is saved, and raise Preempted."""
        if self._saved_at != self.clock.images:
            self.save()
        raise Preempted(f"stopped at {self.clock.images} images; the same command goes on from there")

    def _iteration(self) -> None:
        positions = self.clock.positions()
        batch = self.data.batch(self.world.share(positions), self.world.share(positions + self.clock.batch_size))
        rollouts = [self.ahead.rollout(micro) for micro in batch.split(self.micro_batch)]
        turns = self.method.turns(self.clock)
        for turn in turns:
            self._turn(turn, rollouts)
        for rollout in rollouts:
            if rollout.samples is not None:
                self.monitor.add("student/latent_mean", rollout.samples.mean())
                # of each sample, so that it does not depend on how a batch is split
                self.monitor.add("student/latent_std", rollout.samples.flatten(1).std(dim=1).mean())
            for name, value in rollout.told.items():
                self.monitor.add(name, value)
        self.clock.save_stored(sum(rollout.stored for rollout in rollouts))
        self.clock.advance(student=self.method.has_turn_of(self.config.method.learner, self.clock))

    def _turn(self, turn: Turn, rollouts: list[Rollout]) -> None:
        """One update of one player, accumulated over the micro-batches, and of the roles that follow its role.

        None where no term has a weight: Flash Diffusion without distillation, in its first stage.
        """
        player = self.players[turn.player]
        player.zero_grad()
        weights = self.method.weights(turn.name, self.clock)
        for number, rollout in enumerate(rollouts, 1):
            with self.method.backbone.stepping(player.role):
                terms = self.method.losses(turn.name, rollout, self.clock)
            if not terms:
                continue
            loss = total(terms, weights) / len(rollouts)
            if self.sharded:
                # FSDP2 parameters cannot be passed as `inputs=`. Other players' gradients are cleared by their own
                # `zero_grad`.
                synchronise_gradients(self.method.backbone, number == len(rollouts))
                loss.backward()
            else:
                loss.backward(inputs=player.trained)  # nobody else's gradients are computed
            for term, value in terms.items():
                self.monitor.add(f"{turn.name}/{term}", value)
            for term, norm in rollout.gradient_norms.items():  # of a loss that was divided by their number
                self.monitor.add(f"gradient/{term}", norm * len(rollouts))
            rollout.gradient_norms.clear()
        if not terms:
            return
        self.world.average(player.gradients())
        factor = warmup_factor(self.clock.iteration, self.config.train.lr_warmup_iterations)
        factor *= lr_factor(self.clock.fraction, self.config.train.lr_decay)
        self.monitor.add(f"{turn.name}/grad_norm", player.step(factor))
        if player.role is not None:
            self.method.backbone.merge_again(player.role)
        self.averages.move(player.role, player.applied)

    def _after_iteration(self) -> None:
        execution = self.config.execution
        means = None
        if self._is_due(execution.log_every_images):
            means = self.monitor.flush()
            self._check_divergence(means)
        self.monitor.tick(means)
        if self.sheet is not None and self._is_due(execution.sample_every_images):
            self._draw_sheet()
        if self._is_due(execution.checkpoint_every_images):
            self.save()

    def _is_due(self, images: int) -> bool:
        """Whether this iteration has crossed a multiple of ``images`` (at least 1), or is the last one."""
        before = self.clock.images - self.clock.batch_size
        return self.clock.done or self.clock.images // images > before // images

    def _draw_sheet(self) -> None:
        """By the main process; a sharded network is sampled by all its processes."""
        if self.world.is_main or self.sharded:
            file = self.sheet(self.clock.images)
            if file is not None:
                self.monitor.sheet(file)

    def _must_stop(self) -> bool:
        """Whether a signal came to any process, or the attempt was to end here."""
        stop = self.config.execution.stop_after_images
        signalled = self.world.any(self.flag.raised)
        return signalled or (stop is not None and self.clock.images >= stop)

    def _check_divergence(self, means: Mapping[str, float]) -> None:
        reason = self.method.reason_to_stop(means)
        if reason is not None:
            raise Diverged(f"{reason}, after {self.clock.images} images")
        for name, player in self.players.items():
            if player.skipped_in_row.item() >= MAX_SKIPPED_IN_ROW:
                raise Diverged(
                    f"{name}: gradients not finite for {MAX_SKIPPED_IN_ROW} updates up to {self.clock.images} images"
                )

    def save(self) -> None:
        """One state of all processes, whose counters are summed.

        All wait until it is durable: of processes that stop one after the other a launcher kills the last ones.
        """
        clock = self.clock.state(self.world.total)
        self.checkpoints.save(self.clock.images, self._state(), {"run": self.run.id, "clock": clock})
        self._saved_at = self.clock.images
        self.world.barrier()

    def _state(self) -> dict[str, torch.Tensor]:
        """All that a resume needs: of each player its parameters and moments, and every other role but the base."""
        tensors: dict[str, torch.Tensor] = {}
        for player in self.players.values():
            tensors |= player.state()
        for role, name, parameter in self._frozen_parameters():
            tensors[f"role/{role}/{name}"] = parameter.detach()
        return tensors

    def _frozen_parameters(self) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
        """Role, name and parameter of the roles that no optimizer steps: averages and references."""
        for role in self.method.roles():
            if not role.trainable:
                for name, parameter in self.method.backbone.role_parameters(role.name).items():
                    yield role.name, name, parameter

    def snapshot(self) -> None:
        """Weights to use, at the current position."""
        if self.world.is_main or self.sharded:
            save_snapshot(self.run.path / "snapshots", self.clock.images, self._networks(), self.world)

    def _networks(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Parameters by player, and all else that a finished run is sampled with: frozen roles, what the base holds."""
        networks: dict[str, Mapping[str, torch.Tensor]] = {p.name: p.parameters for p in self.method.players()}
        if self.method.backbone.merged_parent:
            networks[MERGED] = self.method.backbone.merged_parent
        for role in self.method.roles():
            if role.for_sampling and not role.trainable:
                networks[role.name] = self.method.backbone.role_parameters(role.name)
        return networks

    def _resume(self) -> None:
        """Rank 0 looks first: it sets corrupt states aside, so that all load the same one."""
        with self.world.main_first():
            state = self.checkpoints.latest()
        if state is not None:
            folder, meta = state
            if meta.get("run", self.run.id) != self.run.id:  # older states do not say
                raise UserError(f"{folder} is a state of run {meta['run']}, not of {self.run.id}: move it away")
            self._load(folder)
            self.clock.load_state(meta["clock"], counts=self.world.is_main)
        self.method.backbone.count_in(self.clock.evaluations)
        if self.world.is_main:
            self.run.rewind_metrics(self.clock.images if state is not None else 0)

    def _load(self, folder: Path) -> None:
        """A state that was written whole or in parts, by however many processes."""
        if (folder / SINGLE).exists():
            tensors = load_file(folder / SINGLE)
            for player in self.players.values():
                player.load_state(tensors)
            for role, name, parameter in self._frozen_parameters():
                own_part(parameter).copy_(part_of(tensors[f"role/{role}/{name}"], parameter))
            return
        names = names_in(folder)
        for player in self.players.values():
            player.make_room(names)
        read_parts(folder, self._state())


def micro_batch(config: ExperimentConfig, num_processes: int = 1) -> int:
    """The micro-batch; the global batch is identity, so a size that does not divide it is an error."""
    share = config.train.batch_size // num_processes
    size = config.execution.micro_batch or share
    if share % size:
        per = "" if num_processes == 1 else f" / {num_processes} processes"
        raise UserError(f"execution.micro_batch={size} does not divide train.batch_size={config.train.batch_size}{per}")
    return size


def warmup_factor(iteration: int, warmup: int) -> float:
    """Share of the learning rate in the iteration after ``iteration`` others: rises linearly, 1 from ``warmup`` on."""
    return min((iteration + 1) / warmup, 1.0) if warmup else 1.0


def lr_factor(fraction: float, decay: float) -> float:
    """Share of the learning rate after ``fraction`` of the budget: 1, then 1 - sqrt over its last part ``decay``.

    Haegele et al. (2024), "Scaling laws and compute-optimal training beyond fixed training durations", Sec. 3.
    """
    beyond = fraction - (1 - decay)
    return 1.0 if beyond <= 0 else 1 - math.sqrt(min(beyond / decay, 1.0))
