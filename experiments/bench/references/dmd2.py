"""DMD2's step with GAN as its official release schedules it (tianweiy/DMD2, four steps, backward simulation), in fp32.

Mirrored: student, teacher and fake score are three networks and the fake score trains in full, also beside a student of
adapters (peft's, on the frozen copy). In every iteration: backward simulation to one step that the whole batch shares;
the student's sample, with a graph in each fifth iteration alone; the fake score's update with its critic, whose real
and fake images are two half passes. In each fifth iteration before that: the fake score once, the guided teacher as one
batch, a half pass that judges the sample. x0 in float64; AdamW; gradients clipped at 10.
Spared: it logs nothing, so no value is waited for.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from experiments.bench.references.networks import (
    Adapters,
    CountedUNet,
    Examples,
    critic_for,
    load_unet,
    student_of,
    x0_of,
)

STUDENT_TIMES = (999, 749, 499, 249)
TTUR = 5
GUIDANCE = 8.0
DMD_TIMES = (20, 981)  # t of the scores, the end excluded
ADVERSARIAL_WEIGHT, CRITIC_WEIGHT = 5e-3, 1e-2
MAX_GRAD_NORM = 10.0
LR, WEIGHT_DECAY = 5e-7, 0.01


class Dmd2Reference:
    """Student, teacher, fake score and critic with their optimizers."""

    def __init__(self, source: str, adapters: Adapters | None, device: torch.device) -> None:
        self.evaluations: Counter[str] = Counter()
        teacher = load_unet(source, device)
        self.teacher = CountedUNet(teacher, "teacher", self.evaluations)
        self.student = CountedUNet(student_of(teacher, adapters), "student", self.evaluations)
        self.fake_score = CountedUNet(student_of(teacher, None), "fake_score", self.evaluations)
        self.critic = critic_for(teacher, teacher.config.sample_size)
        self.scheduler = DDIMScheduler.from_pretrained(source, subfolder="scheduler")
        self.guidance_parameters = [*self.fake_score.trained(), *self.critic.parameters()]
        options = {"lr": LR, "weight_decay": WEIGHT_DECAY}
        self.student_optimizer = torch.optim.AdamW(self.student.trained(), **options)
        self.guidance_optimizer = torch.optim.AdamW(self.guidance_parameters, **options)

    def iteration(self, number: int, examples: Examples, stop: int) -> None:
        """One iteration; ``stop``: the sampling step that its batch trains."""
        x_t, t = self._simulated(examples, stop)
        if number % TTUR == 0:
            x0 = self._x0(self.student, x_t, t, examples.text)
            self._update_student(x0, examples)
        else:
            with torch.no_grad():
                x0 = self._x0(self.student, x_t, t, examples.text)
        self._update_guidance(x0.detach(), examples)

    @torch.no_grad()
    def _simulated(self, examples: Examples, stop: int) -> tuple[Tensor, Tensor]:
        """The state of the student's own sampling before its call ``stop``."""
        x_t = torch.randn_like(examples.latents)
        for step in range(stop):
            x0 = self._x0(self.student, x_t, self._times(step, x_t), examples.text)
            x_t = self.scheduler.add_noise(x0, torch.randn_like(x0), self._times(step + 1, x_t))
        return x_t, self._times(stop, x_t)

    def _times(self, step: int, like: Tensor) -> Tensor:
        return torch.full((len(like),), STUDENT_TIMES[step], device=like.device)

    def _x0(self, network: CountedUNet, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x0_of(network(x_t, t, text), x_t, t, self.scheduler, torch.float64)

    def _update_student(self, x0: Tensor, examples: Examples) -> None:
        """By both scores and the critic, which do not train in this turn."""
        for parameter in self.guidance_parameters:
            parameter.requires_grad_(False)
        t = torch.randint(*DMD_TIMES, (len(x0),), device=x0.device)
        loss = self.matching_loss(x0, torch.randn_like(x0), t, examples)
        loss = loss + ADVERSARIAL_WEIGHT * F.softplus(-self._logits(x0, examples)).mean()
        for parameter in self.guidance_parameters:
            parameter.requires_grad_(True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.trained(), MAX_GRAD_NORM)
        self.student_optimizer.step()
        self.student_optimizer.zero_grad()

    def matching_loss(self, x0: Tensor, noise: Tensor, t: Tensor, examples: Examples) -> Tensor:
        """Eq. 3 at one noising of the sample, with its 1/2."""
        with torch.no_grad():
            x_t = self.scheduler.add_noise(x0, noise, t)
            fake = self._x0(self.fake_score, x_t, t, examples.text)
            text = torch.cat([examples.null.expand_as(examples.text), examples.text])
            null_raw, raw = self.teacher(x_t.repeat(2, 1, 1, 1), t.repeat(2), text).chunk(2)
            guided = null_raw + GUIDANCE * (raw - null_raw)
            real = x0_of(guided, x_t, t, self.scheduler, torch.float64)
            gradient = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
        return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())

    def _logits(self, latents: Tensor, examples: Examples) -> Tensor:
        """The critic on the fake score's bottleneck of noised latents, t over all times."""
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        x_t = self.scheduler.add_noise(latents, torch.randn_like(latents), t)
        return self.critic(self.fake_score.bottleneck(x_t, t, examples.text))

    def _update_guidance(self, x0: Tensor, examples: Examples) -> None:
        """The fake score denoises the sample; the critic tells it from data."""
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        loss = self.denoising_loss(x0, torch.randn_like(x0), t, examples)
        real, fake = self._logits(examples.latents, examples), self._logits(x0, examples)
        loss = loss + CRITIC_WEIGHT * (F.softplus(fake).mean() + F.softplus(-real).mean())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.guidance_parameters, MAX_GRAD_NORM)
        self.guidance_optimizer.step()
        self.guidance_optimizer.zero_grad()

    def denoising_loss(self, x0: Tensor, noise: Tensor, t: Tensor, examples: Examples) -> Tensor:
        """Squared error of what the network predicts: eps as in the release, v of a teacher that predicts v."""
        raw = self.fake_score(self.scheduler.add_noise(x0, noise, t), t, examples.text)
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        return F.mse_loss(raw, self.scheduler.get_velocity(x0, noise, t) if is_v else noise)
