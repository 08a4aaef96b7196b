"""DMD2: distribution matching with a fake score of its own, trained faster than the student (Yin et al., 2024).

The student is a few-step generator. Its samples come from its own sampling (backward simulation, Sec. 4.5); a fake
score, initialised as the teacher, follows their distribution by denoising; the difference of the two scores is the
student's gradient (Eq. 3), and a critic on the fake score's bottleneck or on decoded images adds what the teacher does
not know (Sec. 4.3). Two time scales (Sec. 4.2): fake score and critic are updated in every iteration, the student in
every ``ttur``-th.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from core.backbones.base import FAKE_SCORE, STUDENT, Cond
from core.backbones.roles import keyed_init
from core.critics.image import DinoFeatures, EffnetFeatures, ImageCritic
from core.critics.latent import LatentCritic
from core.critics.pixel import PixelCritic, SamFeatures
from core.data.batches import Batch
from core.diffusion.solvers import simulate
from core.losses.adversarial import GAN_LOSSES
from core.losses.balance import gradient_at, norms, with_gradient_norms
from core.losses.distill import mse
from core.methods.base import Method, Optimizer, Player, Role, Rollout, Turn, draw
from core.methods.clock import Clock
from core.methods.matching import distribution_matching
from core.methods.rl import RL, Reinforcement
from core.methods.teacher import teacher_sample
from core.sampler import Sampler
from core.schema import UserError

CRITIC = "critic"
FAKE_ROLES = {"network": FAKE_SCORE, "student": STUDENT, "none": None}


@dataclass
class Dmd2Rollout(Rollout):
    """The point at which the student is called with a graph, and pairs of the teacher where it learns from them."""

    x_t: Tensor | None = None  # (B, C, H, W)
    t: Tensor | None = None  # (B,)
    pair_noise: Tensor | None = None  # (B, C, H, W)
    pair_x0: Tensor | None = None  # where the teacher's ODE takes it
    judged: Tensor | None = None  # what the critic judges, where that is not ``samples``


class Dmd2(Method):
    """See the module's docstring; settings are ``Dmd2Config``."""

    def roles(self) -> list[Role]:
        """The student's, those of RL, and a fake score that starts as the teacher."""
        rows = [*super().roles(), *self.rl.roles()]
        if self.fake_role == FAKE_SCORE:
            rows.append(Role(FAKE_SCORE, self.teacher, trainable=True))
        return rows

    @cached_property
    def rl(self) -> Reinforcement:
        """The turns of RL that some settings add."""
        return Reinforcement(self.config.rl, self)

    @property
    def fake_role(self) -> str | None:
        """The role whose score stands for the distribution of the student's samples; none where nothing is matched."""
        return None if self.config.rl.is_alone else FAKE_ROLES[self.config.fake_score]

    def build(self) -> None:
        self.timesteps = self.backbone.process.timesteps(self.config.num_steps)
        self.gan = GAN_LOSSES[self.config.adversarial_loss]()
        self.image_features: nn.Module | None = None
        has_critic = self.config.adversarial_weight and not self.config.rl.is_alone
        self.critic = self._critic() if has_critic else None
        if self.config.critic_crop:
            self._check_crop()

    def _critic(self) -> nn.Module | None:
        """A head on the fake score's bottleneck, or heads on a frozen network's features of decoded images."""
        kind, width = self.config.gan, self.config.critic_channels
        with keyed_init(self.seed, CRITIC):
            if kind == "bottleneck":
                return LatentCritic(self.backbone.feature_shape, width)
            if kind == "off":
                return None
            self.image_features = self._image_features().to(self.backbone.device)
            heads = PixelCritic if self.config.critic_heads == "pooled" else ImageCritic
            return heads(self.image_features.channels, width)

    def _check_crop(self) -> None:
        """UserError where the part that is to be decoded is none of the image."""
        crop, position = self.config.critic_crop, self.backbone.pixels_of_a_position
        side = position * self.backbone.latent_shape[1]
        if crop % position or crop > side:
            raise UserError(
                f"method.critic_crop={crop} does not fit; allowed: 0, or a multiple of {position} up to {side}"
            )

    def _image_features(self) -> nn.Module:
        config, backbone = self.config, self.backbone
        if config.gan == "sam":
            return SamFeatures(
                config.sam_path, config.sam_layers, backbone.compute_dtype, lambda: backbone.checkpoints_activations
            )
        return DinoFeatures(config.dino_path) if config.gan == "dino" else EffnetFeatures()

    @property
    def shares_bottleneck(self) -> bool:
        """Whether the critic is a head of the fake score, trained in its turn."""
        return self.critic is not None and self.config.gan == "bottleneck"

    def players(self) -> list[Player]:
        def optimizer(lr: float, weight_clip: float | None = None) -> Optimizer:
            return Optimizer(lr, tuple(self.config.adam_betas), self.config.weight_decay, weight_clip)

        players = [self.student_player(optimizer(self.config.student_lr))]
        head = {} if self.critic is None else {f"critic.{n}": p for n, p in self.critic.named_parameters()}
        if self.fake_role == FAKE_SCORE:
            own = self.backbone.role_parameters(FAKE_SCORE) | (head if self.shares_bottleneck else {})
            players.append(Player(FAKE_SCORE, own, optimizer(self.config.fake_score_lr), FAKE_SCORE))
        if head and not self.shares_bottleneck:
            players.append(Player(CRITIC, head, optimizer(self.config.critic_lr, self.gan.weight_clip)))
        return players

    def networks_beside(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = self.rl.networks()
        if self.critic is not None:
            found[CRITIC] = self.critic
        if self.image_features is not None:
            found["image_features"] = self.image_features
        return found

    def reason_to_stop(self, means: Mapping[str, float]) -> str | None:
        return self.rl.reason_to_stop(means)

    def turns(self, clock: Clock) -> Sequence[Turn]:
        """Critics in every iteration, from the samples that the student was shown; the student in each ``ttur``-th.

        Its turns are of distillation, or some of RL.
        """
        critics = []
        if self.fake_role == FAKE_SCORE:
            critics.append(Turn(FAKE_SCORE))
        if self.critic is not None and not self.shares_bottleneck:
            critics.append(Turn(CRITIC))
        number, rest = divmod(clock.iteration, self.config.ttur if critics else 1)
        return tuple(critics) if rest else (self.rl.turn_of_student(number), *critics)

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        if turn == RL:
            return self.rl.weights()
        if turn == FAKE_SCORE:
            return {"denoise": 1.0, "critic": self.config.critic_weight}
        if turn == CRITIC:
            return {"critic": 1.0}
        if clock.fraction < self.config.regression_init:
            return {"regression": 1.0, "dmd": 0.0, "adversarial": 0.0}
        return {
            "regression": self.config.regression_weight,
            "dmd": self.config.dmd_weight,
            "adversarial": self.config.adversarial_weight if self.critic is not None else 0.0,
        }

    @torch.no_grad()
    def rollout(self, batch: Batch, clock: Clock) -> Dmd2Rollout:
        """x_t of the student's call, and its sample where no turn of distillation makes it."""
        if self.config.rl.is_alone:
            return Dmd2Rollout(batch)
        index, process = self._steps(batch.positions), self.backbone.process
        noises = self.noises(batch)
        t = draw(self.timesteps[index], batch.x0)
        if self.config.student_input == "noised_data":
            full_noise = draw(index == 0, batch.x0)[:, None, None, None]  # sampling starts there from pure noise
            x_t = torch.where(full_noise, noises[0], process.add_noise(batch.x0, noises[0], t))
        else:
            calls = self._calls(clock)
            x_t = simulate(self.denoise(batch), noises, index.tolist(), self.timesteps, process, calls)
        rollout = Dmd2Rollout(batch, x_t, t)
        if not self.has_turn(STUDENT, clock):
            rollout.samples = self.student_x0(x_t, t, batch.cond)
        if self.problem_stage(clock) is not None:
            self._add_pairs(rollout)
        return rollout

    def noises(self, batch: Batch) -> list[Tensor]:
        """Noise of each step of the student's own sampling."""
        shape = batch.x0.shape[1:]
        draws = (self.stream(STUDENT, f"noise {step}") for step in range(self.config.num_steps))
        return [draw(stream.normal(batch.positions, shape), batch.x0) for stream in draws]

    def problem_stage(self, clock: Clock) -> int | None:
        asks = self.has_turn(STUDENT, clock) and self.weights(STUDENT, clock)["regression"] > 0
        return 0 if asks else None

    def _add_pairs(self, rollout: Dmd2Rollout) -> None:
        """Noise, and where the teacher's guided ODE takes it."""
        batch, steps, guidance = rollout.batch, self.config.regression_steps, self.config.guidance
        draws = self.stream(STUDENT, "regression noise").normal(batch.positions, batch.x0.shape[1:])
        noise = draw(draws, batch.x0)

        def compute() -> Tensor:
            sampler = Sampler(self.config.solver, steps, guidance)
            return teacher_sample(self.backbone, noise, batch.cond, batch.null, sampler, self.teacher)

        cost = self.backbone.passes(guidance, self.teacher) * steps * len(noise)
        target, rollout.stored = self.teacher_solution(batch.positions, compute, cost)
        rollout.pair_noise, rollout.pair_x0 = noise, target.to(noise.device, non_blocking=True)

    def _steps(self, positions: np.ndarray) -> np.ndarray:
        """The sampling step that each sample trains, uniform over ``matched_steps``, int64 (B,)."""
        return self.stream(STUDENT, "step").integers(positions, 0, self.matched_steps)

    @property
    def matched_steps(self) -> int:
        """The number of sampling steps, from full noise on, whose samples are matched to the teacher's."""
        return self.config.num_steps

    def _calls(self, clock: Clock) -> int | None:
        """Calls of a sharded network that the simulation of any process needs in this iteration."""
        return int(self._steps(clock.positions()).max()) if self.lockstep else None

    def losses(self, turn: str, rollout: Dmd2Rollout, clock: Clock) -> dict[str, Tensor]:
        if turn == RL:
            return self.rl.losses(rollout, clock)
        if turn == STUDENT:
            return self._student_losses(rollout, self.weights(STUDENT, clock))
        return self._fake_score_losses(rollout) if turn == FAKE_SCORE else self._critic_losses(rollout)

    def _student_losses(self, rollout: Dmd2Rollout, weights: dict[str, float]) -> dict[str, Tensor]:
        batch = rollout.batch
        with nullcontext() if weights["dmd"] or weights["adversarial"] else torch.no_grad():
            x0 = self.student_x0(rollout.x_t, rollout.t, batch.cond)
        rollout.samples = x0.detach()
        terms: dict[str, Tensor] = {}
        if weights["regression"]:
            terms["regression"] = mse(self._one_step(rollout), rollout.pair_x0).mean()
        if weights["dmd"]:
            low, high, w = self.config.dmd_min, self.config.dmd_max, self.config.guidance
            matched = rollout.watched("dmd", x0)
            terms["dmd"] = 0.5 * distribution_matching(self, matched, batch, w, self.fake_role, low, high)
        if weights["adversarial"]:
            judged = rollout.watched("adversarial", self.judged(rollout, x0))
            if self.config.adversarial_ratio and weights["dmd"]:
                share = self.config.adversarial_ratio * weights["dmd"] / weights["adversarial"]
                wanted = share * norms(gradient_at(terms["dmd"], matched))
                terms["adversarial"] = self._balanced(judged, batch, wanted)
            else:
                terms["adversarial"] = self._adversarial(judged, batch)
        return terms

    def _balanced(self, judged: Tensor, batch: Batch, wanted: Tensor) -> Tensor:
        """``_adversarial`` with a gradient of these norms (B,) at the samples."""
        leaf = judged.detach().requires_grad_()
        return with_gradient_norms(self._adversarial(leaf, batch), leaf, judged, wanted)

    def _adversarial(self, x0: Tensor, batch: Batch) -> Tensor:
        """The student's side of the game."""
        if self.gan.paired:
            real, fake = self._pair_of_logits(batch.x0, x0, batch)
        else:
            real, fake = None, self._logits(x0, batch)
        return self.gan.generator(fake, real)

    def judged(self, rollout: Dmd2Rollout, x0: Tensor) -> Tensor:
        """The student's samples that the critic judges, with a graph where gradients are computed: ``x0`` itself."""
        return x0

    def _one_step(self, rollout: Dmd2Rollout) -> Tensor:
        """The student's x0 from the pairs' noise in one step."""
        noise, first = rollout.pair_noise, self.timesteps[0].item()
        t = torch.full((len(noise),), first, dtype=rollout.t.dtype, device=noise.device)
        return self.student_x0(noise, t, rollout.batch.cond)

    def _fake_score_losses(self, rollout: Dmd2Rollout) -> dict[str, Tensor]:
        """Denoising of the student's samples, in what the network predicts (eps as in DMD2, velocity of a flow)."""
        batch, samples, process = rollout.batch, rollout.samples, self.backbone.process
        t = process.timestep(draw(self.stream(FAKE_SCORE, "timestep").uniform(batch.positions), samples))
        noise = draw(self.stream(FAKE_SCORE, "noise").normal(batch.positions, samples.shape[1:]), samples)
        x_t, kind = process.add_noise(samples, noise, t), self.backbone.prediction
        pred = self.backbone.predict(FAKE_SCORE, x_t, t, batch.cond, as_=kind)
        terms = {"denoise": mse(pred, process.target(samples, noise, t, kind)).mean()}
        if self.shares_bottleneck and self.config.critic_weight:
            terms |= self._critic_losses(rollout)
        return terms

    def _critic_losses(self, rollout: Dmd2Rollout) -> dict[str, Tensor]:
        with torch.no_grad():
            judged = self.judged(rollout, rollout.samples)
        real, fake = self._pair_of_logits(rollout.batch.x0, judged, rollout.batch)
        return {"critic": self.gan.discriminator(real, fake)}

    def _pair_of_logits(self, real: Tensor, fake: Tensor, batch: Batch) -> Sequence[Tensor]:
        """Logits of real and of fake latents, in one batch; pairs share t' and noise."""
        both = Batch(np.concatenate([batch.positions] * 2), batch.x0, Cond.cat([batch.cond] * 2), batch.null)
        return self._logits(torch.cat([real, fake]), both).chunk(2)

    def _logits(self, x0: Tensor, batch: Batch) -> Tensor:
        """Logits of noised latents on the fake score's bottleneck, t' ~ U over all times; or of decoded images."""
        if not self.shares_bottleneck:
            return self.critic(self.image_features(self.backbone.training_pixels(self._cropped(x0, batch))))
        process, p = self.backbone.process, batch.positions
        t = process.timestep(draw(self.stream(CRITIC, "timestep").uniform(p), x0))
        noise = draw(self.stream(CRITIC, "noise").normal(p, x0.shape[1:]), x0)
        return self.critic(self.backbone.features(FAKE_SCORE, process.add_noise(x0, noise, t), t, batch.cond))

    def _cropped(self, x0: Tensor, batch: Batch) -> Tensor:
        """The part of each sample that the critic sees decoded, at a keyed place; pairs have one place."""
        if not self.config.critic_crop:
            return x0
        side, p = self.config.critic_crop // self.backbone.pixels_of_a_position, batch.positions
        places = (self.stream(CRITIC, f"crop {axis}").integers(p, 0, x0.shape[-1] - side + 1) for axis in "yx")
        return torch.stack([x[:, i : i + side, j : j + side] for x, i, j in zip(x0, *places, strict=True)])
