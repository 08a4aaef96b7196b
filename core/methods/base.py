"""The method contract: players, turns, one rollout per iteration, one short loss function per player.

A method holds no counters, no optimizers and no generator state; it moves nothing between devices, calls no backward
and logs nothing. ``players`` is the single list from which optimizers, EMA and checkpoints are made; ``turns`` is the
only place where an update ratio exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.backbones.base import STUDENT, STUDENT_EMA, Backbone, Cond
from core.data.batches import Batch
from core.data.solutions import SolutionStore
from core.diffusion.solvers import boundary_scalings, few_step_sample
from core.methods.clock import Clock
from core.randomness import Stream
from core.sampler import Sampler


@dataclass(frozen=True)
class Optimizer:
    """AdamW settings of one player; ``weight_clip`` bounds every weight after each update."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    weight_clip: float | None = None


@dataclass(frozen=True)
class Player:
    """A set of trainable parameters with its optimizer; ``ema_role`` names the role that averages them."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    ema_role: str | None = None


@dataclass
class Rollout:
    """What one micro-batch's turns share. Only detached tensors may be put here: they outlive the turn.

    ``samples`` is the student's latest output (logged as latent mean and standard deviation).
    """

    batch: Batch
    tensors: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    stored: int = 0  # network evaluations that stored teacher solutions have saved


class Method(ABC):
    """A distillation method on any backbone; see the module's docstring for the contract."""

    trains = True
    lockstep = False  # whether every process must call the networks equally often (sharded training)

    def __init__(
        self,
        config: Any,
        backbone: Backbone,
        seed: int,
        *,
        ema: bool = False,
        solutions: SolutionStore | None = None,
        training: bool = True,
    ) -> None:
        self.config, self.backbone, self.seed, self.ema = config, backbone, seed, ema
        self.solutions = solutions
        if self.trains:
            self._add_student()
        if training:
            self.build()

    @abstractmethod
    def build(self) -> None:
        """Add what training needs beside the student: further roles, critics, losses."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Everything that trains."""

    @abstractmethod
    def turns(self, clock: Clock) -> Sequence[str]:
        """Names of the players that are updated in this iteration, in order."""

    @abstractmethod
    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        """The iteration's shared samples, without graph."""

    @abstractmethod
    def losses(self, player: str, rollout: Rollout, clock: Clock) -> dict[str, Tensor]:
        """Unweighted named terms (scalars) of one player; terms of zero weight are absent."""

    @abstractmethod
    def weights(self, player: str, clock: Clock) -> dict[str, float]:
        """Weight of every term of one player at this time."""

    def stream(self, player: str, purpose: str) -> Stream:
        return Stream(self.seed, player, purpose)

    def _add_student(self) -> None:
        """The student, initialised as the teacher, and the role of its moving average."""
        self.backbone.add_role(STUDENT, trainable=True, seed=self.seed)
        if self.ema:
            self.backbone.add_role(STUDENT_EMA, like=STUDENT, trainable=False, seed=self.seed)

    def student_player(self, optimizer: Optimizer) -> Player:
        parameters = self.backbone.role_parameters(STUDENT)
        return Player(STUDENT, parameters, optimizer, STUDENT_EMA if self.ema else None)

    def problem_stage(self, clock: Clock) -> int | None:
        """What beside its samples decides the teacher problems of an iteration: those of one number may be solved in
        one rollout. None: its rollout asks for none."""
        return 0

    def teacher_solution(self, positions: np.ndarray, solve: Callable[[], Tensor], cost: int) -> tuple[Tensor, int]:
        """A solution of the teacher's ODE, stored or solved now, and the evaluations (of ``cost``) that were saved."""
        if self.solutions is None:
            return solve(), 0
        solution, stored = self.solutions.fetch(positions, solve)
        return solution, stored * cost

    def student_x0(self, rollout: Rollout) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x0 at the rollout's x_t and t, as the sampler evaluates it."""
        x_t, t = rollout.tensors["x_t"], rollout.tensors["t"]
        c_skip, c_out = boundary_scalings(t)
        return c_skip * x_t + c_out * self.backbone.predict(STUDENT, x_t, t, rollout.batch.cond)

    def num_noises(self, steps: int) -> int:
        """How many injected noises ``sample`` reads."""
        return steps

    @torch.no_grad()
    def sample(self, role: str, noises: Sequence[Tensor], cond: Cond, null: Cond, sampler: Sampler) -> Tensor:
        """Few-step sampling: latents (B, C, H, W) from injected noises; solvers: see ``few_step_sample``.

        Guidance 1 is the network as the student trains it, also where guidance is an input of the network.
        """
        process, guidance = self.backbone.process, sampler.guidance

        def denoise(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            if guidance == 1:
                return self.backbone.predict(role, x_t, t, cond[rows])
            return self.backbone.guided(role, x_t, t, cond[rows], null, guidance)

        timesteps = process.timesteps(sampler.steps)
        return few_step_sample(denoise, noises, timesteps, process, sampler.solver, sampler.eta)


def draw(values: np.ndarray, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Keyed draws (made on the CPU) to where ``like`` is; no host synchronisation."""
    tensor = torch.from_numpy(values)
    return tensor.to(device=like.device, dtype=dtype or tensor.dtype, non_blocking=True)


def total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of a turn's terms."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
