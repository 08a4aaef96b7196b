"""Schema of latent consistency distillation (Luo et al., 2023). Defaults: SD1.5, LoRA.

Provenance: [2] second-hand, from the authors' released training as diffusers documents it; the paper itself was not
read. Flash Diffusion's Tables 2 and 3 compare with this method.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.methods.config_base import MethodConfig
from core.schema import UserError, check_choice, check_range, listing, register_schema

REVISION = 1
DISTANCES = ("huber", "mse")


@dataclass
class LcmConfig(MethodConfig):
    """LCM: the student's x0 at t_n+1 against its own average's at t_n, to which one step of the teacher's ODE leads."""

    name: str = "lcm"
    num_timesteps: int = 50  # of the grid t_1 < ... < t_N, trailing spacing: a step of 20 of 1,000 [2]
    guidance_min: float = 6.0  # w ~ U[min, max], x_w = w x_cond + (1 - w) x_null; the release counts from 5 to 15 [2]
    guidance_max: float = 16.0
    distance: str = "huber"  # pseudo-Huber | mse [2]
    huber_c: float = 1e-3  # below which the pseudo-Huber distance is quadratic [2]
    target_decay: float = 0.95  # of the student's average that gives the target, per update [2]
    student_lr: float = 1e-4  # AdamW, LoRA [2]
    adam_betas: list[float] = listing(0.9, 0.999)
    weight_decay: float = 0.0

    @property
    def teacher_guidance(self) -> float:
        """The middle of the training's range of guidance."""
        return (self.guidance_min + self.guidance_max) / 2

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        check_range("method.num_timesteps", self.num_timesteps, 2)
        check_range("method.guidance_max", self.guidance_max, self.guidance_min)
        check_choice("method.distance", self.distance, DISTANCES)
        check_range("method.huber_c", self.huber_c, 1e-12)
        check_range("method.target_decay", self.target_decay, 0.0, 1.0)
        check_range("method.student_lr", self.student_lr, 0.0)
        check_range("method.weight_decay", self.weight_decay, 0.0)
        if len(self.adam_betas) != 2:
            raise UserError(f"method.adam_betas={self.adam_betas} is not a pair; give two values")


register_schema("method", "lcm", LcmConfig, revision=REVISION)
