"""The method contract: roles, players, turns, one rollout per iteration, one short loss function per turn.

Three things that are never fused. *Roles* are networks on the backbone: a table that says like whom each starts,
whether it trains, and whom it follows as a moving average. *Players* are what an optimizer steps. *Turns* say which
player steps, by which losses and in which order; ``turns`` is the only place where an update ratio exists, and two
turns may step the same player by different losses. A method holds no counters, no optimizers and no generator state;
it moves nothing between devices, calls no backward and logs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from core.backbones.base import PARENT, STUDENT, STUDENT_EMA, TEACHER, Backbone, Cond
from core.data.batches import Batch
from core.data.memory import Memory, Rows
from core.diffusion.solvers import Denoise, boundary_scalings, few_step_sample
from core.losses.balance import norms
from core.methods.clock import Clock
from core.randomness import Stream
from core.sampler import Sampler, Setting, teacher_setting

TEACHER_STEPS = 20  # of its pictures beside a student's


@dataclass(frozen=True)
class Optimizer:
    """AdamW settings of one player; ``weight_clip`` bounds every weight after each update."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    weight_clip: float | None = None


@dataclass(frozen=True)
class Role:
    """One network on the backbone: a row of the table that ``Method.roles`` returns.

    It starts with the weights of ``like``. If it ``follows`` a role, it is a moving average of it: after each update
    of that role it keeps the share ``decay`` of itself. A role that neither trains nor follows is a frozen reference.
    """

    name: str
    like: str = TEACHER
    trainable: bool = False
    follows: str | None = None
    decay: float = 0.0
    for_sampling: bool = False  # exists also where a finished run is only sampled, and is part of its snapshots

    @property
    def is_average(self) -> bool:
        """Whether nothing but following moves it; such a role is kept in fp32."""
        return self.follows is not None and not self.trainable


@dataclass(frozen=True)
class Player:
    """A set of trainable parameters with its optimizer; ``role``: the role whose parameters are among them."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    role: str | None = None


@dataclass(frozen=True)
class Turn:
    """One update of one player by the losses of this name; ``player`` is by default the one of the same name."""

    name: str
    player: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "player", self.player or self.name)


@dataclass
class Rollout:
    """The samples that one micro-batch's turns share; a method adds its own typed fields.

    Only detached tensors may be put here, since they outlive the turn. ``samples`` is the student's latest output
    (B, C, H, W), logged as latent mean and standard deviation; ``told`` are scalars to be logged by name.
    """

    batch: Batch
    samples: Tensor | None = field(default=None, kw_only=True)
    stored: int = field(default=0, kw_only=True)  # network evaluations that stored teacher solutions have saved
    told: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    # By term, once its backward pass has come to a watched sample: norm of its gradient there, weight included, as the
    # loss of that sample alone has it; mean over the samples
    gradient_norms: dict[str, Tensor] = field(default_factory=dict, kw_only=True)

    def watched(self, term: str, x0: Tensor) -> Tensor:
        """``x0`` (B, ...) as one term reads it, whose gradient is measured on its way back."""
        if not x0.requires_grad:
            return x0
        branch = x0.view_as(x0)
        branch.register_hook(partial(self._measure, term))
        return branch

    def _measure(self, term: str, gradient: Tensor) -> None:
        self.gradient_norms[term] = len(gradient) * norms(gradient).mean()


class Method(ABC):
    """A distillation method on any backbone; see the module's docstring for the contract."""

    consistency: ClassVar[bool] = True  # the student's x0 is combined with its input, as consistency models do

    def __init__(
        self,
        config: Any,
        backbone: Backbone,
        seed: int,
        *,
        ema_decay: float = 0.0,
        solutions: Rows | None = None,
        memory: Memory | None = None,
        training: bool = True,
        lockstep: bool = False,
        initial: Mapping[str, Callable[[Backbone, str], None]] | None = None,
    ) -> None:
        """Make the roles in the order of their table, then (``training``) what trains beside them.

        ``initial`` loads the weights of roles that start from a file (``train.init_from``); roles made later that are
        like them start with these weights too. ``lockstep``: every process must call the networks equally often
        (sharded training). ``memory``: of trainings in this process that share teacher, data and seed.
        """
        self.config, self.backbone, self.seed = config, backbone, seed
        self.ema_decay, self.solutions, self.memory, self.lockstep = ema_decay, solutions, memory, lockstep
        backbone.read_as, backbone.guidance_inputs = self.readings(), self.guidance_inputs()
        for role in self.roles():
            if training or role.for_sampling:
                self._make(role, (initial or {}).get(role.name))
        if training:
            self.build()

    def _make(self, role: Role, load: Callable[[Backbone, str], None] | None) -> None:
        settings = {"trainable": role.trainable, "average": role.is_average, "seed": self.seed}
        self.backbone.add_role(role.name, role.like, **settings)
        if load is not None:
            load(self.backbone, role.name)

    def roles(self) -> list[Role]:
        """The student, its moving average where ``train.ema_decay`` asks for one, and a parent that is the teacher."""
        rows = [Role(STUDENT, trainable=True, for_sampling=True)]
        if self.ema_decay:
            rows.append(Role(STUDENT_EMA, STUDENT, follows=STUDENT, decay=self.ema_decay, for_sampling=True))
        if self.teacher == PARENT:
            rows.append(Role(PARENT, STUDENT, for_sampling=True))
        return rows

    def readings(self) -> dict[str, str]:
        """By role, what its network's output is taken for (x0, eps, v, flow), where that differs from the base's."""
        return {}

    def guidance_inputs(self) -> frozenset[str]:
        """The roles that take guidance as an input, where the backbone's network has such a layer."""
        if not self.backbone.has_guidance_layer:
            return frozenset()
        parent = [self.teacher] if self.config.parent_takes_guidance else []
        return frozenset([STUDENT, STUDENT_EMA, *parent])

    @property
    def teacher(self) -> str:
        """The role that teaches: the base, or in a later round of a chain the student of the round before.

        Where the base holds that student, it is the base again.
        """
        return PARENT if self.config.teacher_is_parent and self.backbone.merged_parent is None else TEACHER

    @property
    def teacher_setting(self) -> Setting:
        """How the teacher's pictures beside the student's are drawn."""
        return teacher_setting(TEACHER_STEPS, self.config.teacher_guidance)

    @abstractmethod
    def build(self) -> None:
        """Add what training needs beside the roles: critics, losses."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Everything that an optimizer steps."""

    @abstractmethod
    def turns(self, clock: Clock) -> Sequence[Turn]:
        """The updates of this iteration, in order."""

    @abstractmethod
    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        """The iteration's shared samples, without graph."""

    @abstractmethod
    def losses(self, turn: str, rollout: Rollout, clock: Clock) -> dict[str, Tensor]:
        """Unweighted named terms (scalars) of one turn; terms of zero weight are absent."""

    @abstractmethod
    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        """Weight of every term of one turn at this time."""

    def networks_beside(self) -> dict[str, nn.Module]:
        """Networks that the losses read beside the backbone's, by name: critics that train, and frozen ones."""
        return {}

    def reason_to_stop(self, means: Mapping[str, float]) -> str | None:
        """Why the training should end now, by the averages of a log interval, such as a hacked reward; None: go on."""
        return None

    def stream(self, player: str, purpose: str) -> Stream:
        """Keyed draws for one purpose of one player (or role): a pure function of the run's seed and a position."""
        return Stream(self.seed, player, purpose)

    def student_player(self, optimizer: Optimizer) -> Player:
        """The player that steps the student's own parameters."""
        return Player(STUDENT, self.backbone.role_parameters(STUDENT), optimizer, STUDENT)

    def has_turn_of(self, player: str, clock: Clock) -> bool:
        """Whether a player steps in this iteration."""
        return any(turn.player == player for turn in self.turns(clock))

    def has_turn(self, name: str, clock: Clock) -> bool:
        """Whether this iteration has a turn of this name."""
        return any(turn.name == name for turn in self.turns(clock))

    def problem_stage(self, clock: Clock) -> int | None:
        """The stage whose kind of teacher problems this iteration poses; those of one stage may be solved together.

        None: its rollout asks for none.
        """
        return 0

    def teacher_solution(self, positions: np.ndarray, solve: Callable[[], Tensor], cost: int) -> tuple[Tensor, int]:
        """A solution of the teacher's ODE, stored or solved now, and the evaluations (of ``cost``) that were saved."""
        if self.solutions is None:
            return solve(), 0
        solution, stored = self.solutions.fetch(positions, solve)
        return solution, stored * cost

    @torch.no_grad()
    def once(
        self, purpose: str, settings: Sequence[object], positions: np.ndarray, compute: Callable[[], Tensor], cost: int
    ) -> tuple[Tensor, int]:
        """A tensor by sample that teacher, data, keyed draws and ``settings`` decide, and the evaluations saved.

        Trainings that share a memory compute it once, at the cost of ``cost`` evaluations.
        """
        if self.memory is None:
            return compute(), 0
        rows = self.memory.rows(type(self).__name__, self.seed, purpose, *settings)
        found, was_kept = rows.fetch(positions, compute)
        return found, was_kept * cost

    def few_step_x0(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """A role's f(x_t, t) = c_skip x_t + c_out x0, as the sampler evaluates it; latents (B, C, H, W).

        x0 alone where the student is no ``consistency`` model.
        """
        x0 = self.backbone.predict(role, x_t, t, cond)
        if not self.consistency:
            return x0
        c_skip, c_out = boundary_scalings(t)
        return c_skip * x_t + c_out * x0

    def student_x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """``few_step_x0`` of the student."""
        return self.few_step_x0(STUDENT, x_t, t, cond)

    def denoise(self, batch: Batch) -> Denoise:
        """The student's network as its simulation calls it."""

        def call(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return self.backbone.predict(STUDENT, x, t, batch.cond[rows])

        return call

    def uniform_guidance(self, purpose: str, batch: Batch, low: float, high: float) -> Tensor | float:
        """Guidance w ~ U[low, high] per sample, float32 (B,); a number when the range is a point."""
        if low == high:
            return float(low)
        return draw(self.stream(STUDENT, purpose).uniform(batch.positions, low, high), batch.x0, torch.float32)

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
            if guidance == 1 and role not in self.backbone.guidance_inputs:
                return self.backbone.predict(role, x_t, t, cond[rows])
            return self.backbone.guided(role, x_t, t, cond[rows], null, guidance)

        timesteps = process.timesteps(sampler.steps)
        solver, eta = sampler.solver, sampler.eta
        return few_step_sample(denoise, noises, timesteps, process, solver, eta, consistency=self.consistency)


def draw(values: np.ndarray, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Keyed draws (made on the CPU) to where ``like`` is; no host synchronisation."""
    tensor = torch.from_numpy(values)
    return tensor.to(device=like.device, dtype=dtype or tensor.dtype, non_blocking=True)


def total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of a turn's terms."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
