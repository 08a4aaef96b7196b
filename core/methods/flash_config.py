"""Schema of Flash Diffusion (Chadebec et al., 2024). Defaults: SD1.5 of the paper.

Provenance: [P] in the paper, [C] in its official release. Lists are per stage; stages are equal parts of the
budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.losses.files import NEEDS_VGG, VGG_FILE
from core.methods.config_base import MethodConfig, TeacherProblem, WeightFile
from core.schema import UserError, check_choice, check_range, execution, listing, register_schema

REVISION = 1
DISTILL_LOSSES = ("mse", "l1", "lpips", "effnet_lite1")
ADVERSARIAL_LOSSES = ("lsgan", "hinge", "wgan", "non_saturating", "relativistic")
TIMESTEP_DISTRIBUTIONS = ("mixture", "uniform", "gaussian", "sharp")


@dataclass
class FlashConfig(MethodConfig):
    """Flash Diffusion: L = distill_weight L_distil + adversarial_weight L_adv + dmd_weight L_DMD (Eq. 10)."""

    name: str = "flash"
    num_timesteps: int = 32  # K, start points of the teacher's ODE, trailing spacing [P]
    timestep_distribution: str = "mixture"  # pi(t): mixture (Eq. 7) | uniform | gaussian | sharp [P]
    mixture_variance: float = 0.5  # of each mode, squared index units (Eq. 7) [P]; the release has 0.25 [C]
    # Weights beta of the modes at full, 3/4, 1/2 and 1/4 noise, one row per stage [C]
    stage_weights: list[list[float]] = listing(
        (0.0, 0.0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25, 0.25, 0.25, 0.25), (0.4, 0.2, 0.2, 0.2)
    )
    guidance_min: float = 3.0  # w ~ U[min, max] of the teacher, x_w = w x_cond + (1 - w) x_null [P]
    guidance_max: float = 13.0
    solver: str = "dpmpp_2m"  # of the teacher: dpmpp_2m | ddim
    distill_loss: str = "mse"  # in latents: mse [P] | l1; of decoded images: lpips [P] | effnet_lite1
    lpips_path: str | None = execution(None)  # torchvision's vgg16-397923af.pth, for lpips
    distill_weight: float = 1.0
    adversarial_loss: str = "lsgan"  # lsgan (Eq. 8) | hinge | wgan [P] | non_saturating [C] | relativistic
    adversarial_weight: list[float] = listing(0.0, 0.1, 0.2, 0.3)  # lambda_adv per stage [P]
    adversarial_timesteps: list[float] = listing(0.01, 0.25, 0.5, 0.75)  # t' as a fraction of T [P]
    dmd_weight: list[float] = listing(0.0, 0.3, 0.5, 0.7)  # lambda_DMD per stage [P]
    student_lr: float = 1e-5  # Adam [P]
    critic_lr: float = 1e-5  # Adam [P]
    adam_betas: list[float] = listing(0.9, 0.999)
    weight_decay: float = 0.0
    critic_channels: int = 64  # width of the critic's head on the teacher's bottleneck features [C]

    @property
    def teacher_problem(self) -> TeacherProblem:
        """The start points of the teacher's ODE, its guidance and its solver."""
        fields = (
            "num_timesteps", "timestep_distribution", "mixture_variance", "stage_weights", "guidance_min",
            "guidance_max", "solver",
        )  # fmt: skip
        return TeacherProblem(fields, len(self.stage_weights), self._calls())

    def _calls(self) -> float:
        """Solver steps from a start point, on average over pi(t) of all stages; none where no loss reads a solution."""
        from core.diffusion.timesteps import timestep_pmf  # takes numpy, which a configuration alone does not need

        kind, num_steps = self.timestep_distribution, self.num_timesteps
        if not self.distill_weight:
            return 0.0
        stages = [timestep_pmf(kind, num_steps, row, self.mixture_variance) for row in self.stage_weights]
        return float(sum(stages) @ range(num_steps, 0, -1)) / len(stages)

    @property
    def weight_files(self) -> tuple[WeightFile, ...]:
        """The network of LPIPS, whose file is checked by its hash when it is read."""
        if self.distill_loss != "lpips":
            return ()
        return (WeightFile("lpips_path", needed=NEEDS_VGG, file=VGG_FILE, package="lpips"),)

    @property
    def teacher_guidance(self) -> float:
        """The middle of the training's range of guidance."""
        return (self.guidance_min + self.guidance_max) / 2

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        if self.num_timesteps < 4 or self.num_timesteps % 4:
            raise UserError(f"method.num_timesteps={self.num_timesteps} is not a positive multiple of 4")
        check_choice("method.timestep_distribution", self.timestep_distribution, TIMESTEP_DISTRIBUTIONS)
        check_choice("method.solver", self.solver, ("dpmpp_2m", "ddim"))
        check_choice("method.distill_loss", self.distill_loss, DISTILL_LOSSES)
        check_choice("method.adversarial_loss", self.adversarial_loss, ADVERSARIAL_LOSSES)
        check_range("method.mixture_variance", self.mixture_variance, 1e-6)
        check_range("method.guidance_max", self.guidance_max, self.guidance_min)
        check_range("method.distill_weight", self.distill_weight, 0.0)
        check_range("method.critic_channels", self.critic_channels, 1)
        for key in ("student_lr", "critic_lr", "weight_decay"):
            check_range(f"method.{key}", getattr(self, key), 0.0)
        self._validate_stages()
        for fraction in self.adversarial_timesteps:
            check_range("method.adversarial_timesteps", fraction, 0.0, 0.999)  # t = T does not exist
        if len(self.adam_betas) != 2:
            raise UserError(f"method.adam_betas={self.adam_betas} is not a pair; give two values")

    def _validate_stages(self) -> None:
        num_stages = len(self.stage_weights)
        for row in self.stage_weights:
            if len(row) != 4 or min(row) < 0 or sum(row) <= 0:
                raise UserError(f"method.stage_weights row {row} is not 4 weights >= 0 (full, 3/4, 1/2, 1/4 noise)")
        for key in ("adversarial_weight", "dmd_weight"):
            values = getattr(self, key)
            if len(values) != num_stages:
                raise UserError(
                    f"method.{key} has {len(values)} values, method.stage_weights has {num_stages} stages; "
                    "give one value per stage"
                )
            for value in values:
                check_range(f"method.{key}", value, 0.0)


register_schema("method", "flash", FlashConfig, revision=REVISION)
