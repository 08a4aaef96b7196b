"""Flash Diffusion's step as its official release schedules it (gojasper/flash-diffusion), in its last stage.

Mirrored: the release computes everything once for each of its two optimizers, the teacher's whole solution included;
one start for the whole batch; guidance as two passes one after the other; critic features of fake and real images in
one batch with a graph; plain autocast over all of it; AdamW as torch makes it, without clipping.
Spared: it logs and encodes nothing.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from core.backbones.precision import computing_in
from experiments.bench.references.networks import (
    Adapters,
    CountedUNet,
    Examples,
    critic_for,
    load_unet,
    student_of,
    x0_of,
)

CRITIC_TIMES = (10, 250, 500, 750)
GUIDANCE = (3.0, 13.0)
ADVERSARIAL_WEIGHT, DMD_WEIGHT = 0.3, 0.7  # of the last stage
LR = 1e-5


class FlashReference:
    """Student, teacher and critic with their optimizers; ``dtype``: of autocast, None for fp32."""

    def __init__(
        self,
        source: str,
        adapters: Adapters | None,
        dtype: torch.dtype | None,
        num_timesteps: int,
        device: torch.device,
    ) -> None:
        self.evaluations: Counter[str] = Counter()
        teacher = load_unet(source, device)
        self.teacher = CountedUNet(teacher, "teacher", self.evaluations)
        self.student = CountedUNet(student_of(teacher, adapters), "student", self.evaluations)
        self.critic = critic_for(teacher, teacher.config.sample_size)
        self.dtype, self.num_timesteps = dtype, num_timesteps
        self.solver = DPMSolverMultistepScheduler.from_pretrained(
            source, subfolder="scheduler", timestep_spacing="trailing"
        )
        self.noising = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
        self.optimizers = (
            torch.optim.AdamW(self.student.trained(), lr=LR),
            torch.optim.AdamW(self.critic.parameters(), lr=LR),
        )

    def step(self, examples: Examples, start: int) -> None:
        """One training step from the solver's point ``start``: the student's update, then the critic's."""
        for turn, optimizer in enumerate(self.optimizers):
            with self._autocast(examples.latents):
                loss = self.losses(examples, start)[turn]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _autocast(self, like: Tensor) -> AbstractContextManager:
        """Autocast; a CPU without 16-bit units multiplies as ours does there, or it would take twelve times as long."""
        return computing_in(self.dtype, like)

    def losses(self, examples: Examples, start: int) -> tuple[Tensor, Tensor]:
        """The student's loss and the critic's; each caller uses one of them."""
        x_t, t = self._noised(examples.latents, start)
        scaled = (t.float() / 0.1).view(-1, 1, 1, 1)
        norm = scaled**2 + 0.25
        x0 = 0.25 / norm * x_t + scaled / norm.sqrt() * self._x0(self.student(x_t, t, examples.text), x_t, t)
        target = self._solution(x_t, start, examples)
        student = F.mse_loss(x0, target) + DMD_WEIGHT * self._dmd(x0, examples)
        fake, real = self._features(x0, examples)
        adversarial = (1 - self.critic(fake)).square().mean()
        critic = 0.5 * ((1 - self.critic(real)).square().mean() + self.critic(fake.detach()).square().mean())
        return student + ADVERSARIAL_WEIGHT * adversarial, critic

    def _noised(self, latents: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The student's input; at full noise it is noise alone."""
        self.solver.set_timesteps(self.num_timesteps, device=latents.device)
        t = self.solver.timesteps[start].repeat(len(latents))
        noise = torch.randn_like(latents)
        return (noise if start == 0 else self.noising.add_noise(latents, noise, t)), t

    @torch.no_grad()
    def _solution(self, x_t: Tensor, start: int, examples: Examples) -> Tensor:
        """The teacher's guided ODE from ``x_t``."""
        w = _guidance(x_t)
        for time in self.solver.timesteps[start:]:
            raw = self._guided(x_t, time.repeat(len(x_t)), examples, w)
            x_t = self.solver.step(raw, time, x_t, return_dict=False)[0]
        return x_t

    @torch.no_grad()
    def _guided(self, x_t: Tensor, t: Tensor, examples: Examples, w: Tensor) -> Tensor:
        with_text = self.teacher(x_t, t, examples.text)
        without = self.teacher(x_t, t, examples.null.expand_as(examples.text))
        return w * with_text + (1 - w) * without

    def _dmd(self, x0: Tensor, examples: Examples) -> Tensor:
        """Eq. 9 with the student as the fake score."""
        with torch.no_grad():
            t = torch.randint(0, self.noising.config.num_train_timesteps, (len(x0),), device=x0.device)
            x_t = self.noising.add_noise(x0, torch.randn_like(x0), t)
            real = self._x0(self._guided(x_t, t, examples, _guidance(x0)), x_t, t)
            fake = self._x0(self.student(x_t, t, examples.text), x_t, t)
            gradient = (fake - real) / ((x0 - real).abs().mean((1, 2, 3), keepdim=True) + 1e-5)
        return F.mse_loss(x0, (x0 - gradient).detach())

    def _features(self, x0: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
        """The teacher's bottleneck of re-noised fake and real latents."""
        chosen = torch.randint(0, len(CRITIC_TIMES), (len(x0),), device=x0.device)
        t = torch.tensor(CRITIC_TIMES, device=x0.device)[chosen]
        noise = torch.randn_like(x0)
        both = torch.cat([self.noising.add_noise(latents, noise, t) for latents in (x0, examples.latents)])
        fake, real = self.teacher.bottleneck(both, t.repeat(2), examples.text.repeat(2, 1, 1)).chunk(2)
        return fake, real

    def _x0(self, raw: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x0_of(raw, x_t, t, self.noising, torch.float32)


def _guidance(like: Tensor) -> Tensor:
    """One w for the batch, drawn from the range."""
    low, high = GUIDANCE
    return low + (high - low) * torch.rand(1, device=like.device)
