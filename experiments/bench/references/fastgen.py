"""DMD2's step as NVIDIA FastGen schedules it (NVlabs/FastGen, four steps, no activation checkpointing), in fp32.

Mirrored: the student's input is noised data, so there is no rollout; an iteration updates either the student or fake
score and critic, never both, and makes a sample of the student for itself. The critic reads the frozen teacher's
bottleneck: of the sample in the teacher's own pass, which keeps its graph, the pass without text apart; in the critic's
turn as one half pass for fake and one for real images, with the time and noise of the fake score. AdamW; gradients
clipped at 10. The fake score trains in full beside a student of adapters.
Spared: moving averages and logs.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

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
STUDENT_UPDATE_FREQ = 6  # five updates of the critics for one of the student: what DMD2 calls 5 and FastGen 6
GUIDANCE = 8.0
ADVERSARIAL_WEIGHT = 5e-3
MAX_GRAD_NORM = 10.0
LR = 5e-5


class FastGenReference:
    """Student, teacher, fake score and critic, with an optimizer for each that trains."""

    def __init__(self, source: str, adapters: Adapters | None, device: torch.device) -> None:
        self.evaluations: Counter[str] = Counter()
        teacher = load_unet(source, device)
        self.teacher = CountedUNet(teacher, "teacher", self.evaluations)
        self.student = CountedUNet(student_of(teacher, adapters), "student", self.evaluations)
        self.fake_score = CountedUNet(student_of(teacher, None), "fake_score", self.evaluations)
        self.critic = critic_for(teacher, teacher.config.sample_size)
        self.scheduler = DDIMScheduler.from_pretrained(source, subfolder="scheduler")
        self.student_parameters = self.student.trained()
        self.student_optimizer = torch.optim.AdamW(self.student_parameters, lr=LR)
        self.critics = (self.fake_score.unet, self.critic)
        self.critic_optimizers = [torch.optim.AdamW(network.parameters(), lr=LR) for network in self.critics]

    def iteration(self, number: int, examples: Examples) -> None:
        """One iteration: the student's turn or that of fake score and critic, never both."""
        is_students = number % STUDENT_UPDATE_FREQ == 0
        for network in self.critics:
            network.train(not is_students).requires_grad_(not is_students)
        x_t, student_t = self._noised_data(examples.latents)
        t = torch.randint(1, self.scheduler.config.num_train_timesteps - 1, (len(x_t),), device=x_t.device)
        noise = torch.randn_like(x_t)
        if is_students:
            self._update_student(x_t, student_t, t, noise, examples)
        else:
            self._update_critics(x_t, student_t, t, noise, examples)

    def _noised_data(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, len(STUDENT_TIMES), (len(latents),), device=latents.device)
        t = torch.tensor(STUDENT_TIMES, device=latents.device)[chosen]
        return self.scheduler.add_noise(latents, torch.randn_like(latents), t), t

    def _update_student(self, x_t: Tensor, student_t: Tensor, t: Tensor, noise: Tensor, examples: Examples) -> None:
        x0 = self._x0(self.student(x_t, student_t, examples.text), x_t, student_t)
        noised = self.scheduler.add_noise(x0, noise, t)
        with torch.no_grad():
            fake = self._x0(self.fake_score(noised, t, examples.text), noised, t)
        raw, features = self.teacher.with_bottleneck(noised, t, examples.text)
        adversarial = F.softplus(-self.critic(features)).mean()
        with torch.no_grad():
            with_text = self._x0(raw, noised, t)
            without = self._x0(self.teacher(noised, t, examples.null.expand_as(examples.text)), noised, t)
            real = with_text + (GUIDANCE - 1) * (with_text - without)
            gradient = (fake - real) / ((x0 - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
        loss = 0.5 * F.mse_loss(x0, (x0 - gradient).detach()) + ADVERSARIAL_WEIGHT * adversarial
        loss.backward()
        self._step(self.student_optimizer, self.student_parameters)

    def _update_critics(self, x_t: Tensor, student_t: Tensor, t: Tensor, noise: Tensor, examples: Examples) -> None:
        with torch.no_grad():
            x0 = self._x0(self.student(x_t, student_t, examples.text), x_t, student_t)
            noised = self.scheduler.add_noise(x0, noise, t)
        loss = self._denoising_loss(self.fake_score(noised, t, examples.text), x0, noise, t)
        with torch.no_grad():
            fake = self.teacher.bottleneck(noised, t, examples.text)
            real = self.teacher.bottleneck(self.scheduler.add_noise(examples.latents, noise, t), t, examples.text)
        loss = loss + F.softplus(self.critic(fake)).mean() + F.softplus(-self.critic(real)).mean()
        loss.backward()
        for optimizer, network in zip(self.critic_optimizers, self.critics, strict=True):
            self._step(optimizer, list(network.parameters()))

    def _denoising_loss(self, raw: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of what the network predicts."""
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        return F.mse_loss(raw, self.scheduler.get_velocity(x0, noise, t) if is_v else noise)

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    def _x0(self, raw: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x0_of(raw, x_t, t, self.scheduler, torch.float64)
