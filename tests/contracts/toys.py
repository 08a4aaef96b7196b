"""Methods that no package of ours knows, registered as a user's own would be: they show what the contract can say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from core.backbones.base import STUDENT
from core.backbones.roles import keyed_init
from core.data.batches import Batch
from core.losses.distill import mse
from core.methods.base import Method, Optimizer, Player, Role, Rollout, Turn, draw
from core.methods.clock import Clock
from core.methods.config_base import MethodConfig
from core.methods.flash import Flash
from core.methods.flash_config import FlashConfig
from core.schema import SCHEMAS, discover_schemas, register_schema
from experiments.build import FAMILIES, METHODS, TASKS

REFERENCE, REWARD_MODEL, SCORE = "reference", "reward_model", "score"


@dataclass
class TwoTurnsConfig(MethodConfig):
    """A student with a turn towards the data and, in every second iteration, one away from a frozen reference."""

    name: str = "toy_two_turns"
    num_timesteps: int = 8
    student_lr: float = 1e-3
    critic_lr: float = 1e-3

    @property
    def period(self) -> int:
        return 2

    def validate(self) -> None:
        """Everything is allowed."""


class TwoTurns(Method):
    """Two turns step one player by different losses; a score follows the student and trains too."""

    def roles(self) -> list[Role]:
        return [
            *super().roles(),
            Role(REFERENCE, STUDENT),
            Role(SCORE, STUDENT, trainable=True, follows=STUDENT, decay=0.5),
        ]

    def build(self) -> None:
        self.timesteps = self.backbone.process.timesteps(self.config.num_timesteps)

    def players(self) -> list[Player]:
        score = Player(SCORE, self.backbone.role_parameters(SCORE), Optimizer(self.config.critic_lr), SCORE)
        return [self.student_player(Optimizer(self.config.student_lr)), score]

    def turns(self, clock: Clock) -> Sequence[Turn]:
        towards, away = Turn("towards", STUDENT), Turn("away", STUDENT)
        return (towards, away, Turn(SCORE)) if clock.iteration % 2 == 0 else (Turn(SCORE),)

    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        return Rollout(batch)

    def losses(self, turn: str, rollout: Rollout, clock: Clock) -> dict[str, Tensor]:
        batch, role = rollout.batch, SCORE if turn == SCORE else STUDENT
        t = draw(self.timesteps[:1].repeat(len(batch.x0)), batch.x0)
        noise = draw(self.stream(role, "noise").normal(batch.positions, batch.x0.shape[1:]), batch.x0)
        x0 = self.few_step_x0(role, noise, t, batch.cond)
        rollout.samples = x0.detach()
        if turn == "away":
            with torch.no_grad():
                reference = self.few_step_x0(REFERENCE, noise, t, batch.cond)
            return {"distance": mse(x0, reference).mean()}
        return {"distance": mse(x0, batch.x0).mean()}

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        return {"distance": -0.5 if turn == "away" else 1.0}


@dataclass
class RewardConfig(MethodConfig):
    """A network that learns to judge latents and has no student."""

    learner: ClassVar[str] = REWARD_MODEL

    name: str = "toy_reward"
    num_timesteps: int = 8
    student_lr: float = 1e-3

    def validate(self) -> None:
        """Everything is allowed."""


class Reward(Method):
    """A half of the network, as an adapter, and a head that tells faint latents from strong ones."""

    def roles(self) -> list[Role]:
        return [Role(REWARD_MODEL, trainable=True)]

    def build(self) -> None:
        channels = self.backbone.feature_shape[0]
        with keyed_init(self.seed, REWARD_MODEL):
            self.head = nn.Linear(channels, 1)

    def networks_beside(self) -> dict[str, nn.Module]:
        return {"head": self.head}

    def players(self) -> list[Player]:
        """The head, and those of the adapter's parameters that the bottleneck reads."""
        head = {f"head.{name}": value for name, value in self.head.named_parameters()}
        own = self.backbone.role_parameters(REWARD_MODEL)
        return [Player(REWARD_MODEL, own | head, Optimizer(self.config.student_lr), REWARD_MODEL)]

    def turns(self, clock: Clock) -> Sequence[Turn]:
        return (Turn(REWARD_MODEL),)

    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        return Rollout(batch)

    def losses(self, turn: str, rollout: Rollout, clock: Clock) -> dict[str, Tensor]:
        batch = rollout.batch
        t = self.backbone.process.timestep(torch.full((len(batch.x0),), 0.1))
        noise = draw(self.stream(REWARD_MODEL, "noise").normal(batch.positions, batch.x0.shape[1:]), batch.x0)
        good, bad = self._score(0.1 * batch.x0, t, batch), self._score(noise, t, batch)
        return {"pairs": nn.functional.softplus(bad - good).mean()}

    def _score(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return self.head(self.backbone.features(REWARD_MODEL, x_t, t, batch.cond).mean((2, 3)))

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        return {"pairs": 1.0}


@dataclass
class RoundConfig(FlashConfig):
    """Flash Diffusion in a later round: what ``train.init_from`` names is student and teacher."""

    teacher_is_parent: ClassVar[bool] = True

    name: str = "toy_round"


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """What is registered inside is unknown outside, to other tests of the same process."""
    discover_schemas()
    registries = [*SCHEMAS.values(), FAMILIES, METHODS, TASKS]
    known = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, before in zip(registries, known, strict=True):
            registry.clear()
            registry.update(before)


def register() -> None:
    """Make the toys selectable by name."""
    for name, schema, method in (
        ("toy_two_turns", TwoTurnsConfig, TwoTurns),
        ("toy_reward", RewardConfig, Reward),
        ("toy_round", RoundConfig, Flash),
    ):
        register_schema("method", name, schema, revision=1)
        METHODS[name] = method
