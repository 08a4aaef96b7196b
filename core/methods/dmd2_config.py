"""Schema of DMD2 (Yin et al., 2024), also the recipe of FLUX.2's step distillation. Defaults: SDXL, 4 steps, LoRA.

Provenance: [P] in the paper or the FLUX.2 article, [C] in DMD2's official code.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.losses.files import NEEDS_DINO, NEEDS_SAM
from core.methods.config_base import MethodConfig, TeacherProblem, WeightFile
from core.methods.rl_settings import RlConfig
from core.schema import UserError, added, check_choice, check_range, execution, listing, register_schema

REVISION = 1
STUDENT_INPUTS = ("backward_simulation", "noised_data")
FAKE_SCORES = ("network", "student", "none")
GANS = ("off", "bottleneck", "dino", "sam", "effnet_lite1")
ON_IMAGES = ("dino", "sam", "effnet_lite1")
HEADS = ("patch", "pooled")
GAN_LOSSES = ("non_saturating", "lsgan", "hinge", "wgan", "relativistic")


@dataclass
class Dmd2Config(MethodConfig):
    """DMD2. Generator: dmd_weight L_DMD + adversarial_weight L_G + regression_weight L_ODE; score: L_denoise + L_D."""

    name: str = "dmd2"
    num_steps: int = 4  # of the student, trailing spacing: 999, 749, 499, 249 [C]
    student_input: str = "backward_simulation"  # x_t of the student's own sampling | noised_data: of noised images
    ttur: int = 5  # the student is updated in every ttur-th iteration, fake score and critic in each [P]
    # The distribution of the student's samples is known from a network that follows it | the student itself (Flash
    # Diffusion) | none: the gradient then is the teacher's alone (the ablation's collapse) [P]
    fake_score: str = "network"
    guidance: float = 8.0  # w of the real score, x_w = w x_cond + (1 - w) x_null [C]
    dmd_weight: float = 1.0  # of L_DMD with its 1/2 [C]
    dmd_min: float = 0.02  # t'' ~ U[min, max] as fractions of T [C]
    dmd_max: float = 0.98
    # bottleneck: a head on the fake score's bottleneck, noised images [C] | on decoded images: dino [P] | sam: the
    # encoder of Flash-DMD's Pixel-GAN | effnet_lite1: the embedded ImageNet network, which stands in for both
    gan: str = "bottleneck"
    dino_path: str | None = execution(None)  # folder of a DINO or DINOv2 in transformers' format, for gan: dino
    dino_hash: str = added("", old="")  # of that folder; filled in
    sam_path: str | None = execution(None)  # folder of a SAM in transformers' format, for gan: sam
    sam_hash: str = added("", old="")  # of that folder; filled in
    sam_layers: list[int] = added([3, 6, 9, 12], old=[3, 6, 9, 12])  # of its image encoder, from 1, read by a head each
    # Of a critic on decoded images: patch: each position is judged | pooled: the image on each level, as in Pixel-GAN
    critic_heads: str = added("patch", old="patch")
    # Pixels of a side of the part that is decoded for such a critic, at a keyed place; 0: whole images
    critic_crop: int = added(0, old=0)
    # Pairs of noise and the teacher's ODE solution from it, which the student learns in one step (DMD; not needed in
    # DMD2 [P], but for the initialisation of a one-step student [C])
    regression_weight: float = 0.0
    regression_init: float = 0.0  # first part of the budget, in which the student learns from pairs alone
    regression_steps: int = 50  # of the teacher's solver
    solver: str = "dpmpp_2m"  # of the teacher: dpmpp_2m | ddim
    adversarial_loss: str = "non_saturating"  # softplus on both sides [C] | lsgan | hinge | wgan | relativistic
    adversarial_weight: float = 5e-3  # of the student's side; SD1.5: 1e-3 [C]
    # Norm of the critic's gradient at a sample of the student over that of the DM term, weights included: the former is
    # scaled to it, sample by sample, whatever adversarial_weight is; 0: it is as the weight makes it
    adversarial_ratio: float = added(0.0, old=0.0)
    critic_weight: float = 1e-2  # of the critic's side beside L_denoise, with which it shares the bottleneck [C]
    critic_channels: int = 64  # width of the critic's head
    student_lr: float = 5e-5  # AdamW; full fine-tuning: 5e-7 [C]
    fake_score_lr: float = 5e-5
    critic_lr: float = 5e-5  # of a critic on decoded images; one on the bottleneck trains with the fake score
    adam_betas: list[float] = listing(0.9, 0.999)
    weight_decay: float = 0.01  # [C]
    rl: RlConfig = added(RlConfig, old=RlConfig())  # turns of RL among those of the student (Flash-DMD, stage 2)

    @property
    def period(self) -> int:
        """The update ratio: the student has its turn once in as many iterations."""
        return 1 if self.rl.is_alone else self.ttur

    @property
    def teacher_problem(self) -> TeacherProblem | None:
        """Solutions from pure noise, where the student learns from pairs."""
        if not (self.regression_weight or self.regression_init):
            return None
        share = 1.0 if self.regression_weight else self.regression_init
        return TeacherProblem(
            ("regression_steps", "guidance", "solver"), calls=self.regression_steps * share / self.ttur
        )

    @property
    def teacher_guidance(self) -> float:
        """The guidance of the real score."""
        return self.guidance

    @property
    def weight_files(self) -> tuple[WeightFile, ...]:
        """The network whose features of decoded images the critic reads, and the reward model."""
        plan = "image_features is planned as"
        files = {
            "dino": WeightFile("dino_path", "dino_hash", f"{plan} DINOv2-B", NEEDS_DINO, "config.json"),
            "sam": WeightFile("sam_path", "sam_hash", f"{plan} SAM ViT-H", NEEDS_SAM, "config.json"),
        }
        return (*((files[self.gan],) if self.gan in files else ()), *self.rl.weight_files)

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        check_range("method.num_steps", self.num_steps, 1)
        check_range("method.ttur", self.ttur, 1)
        check_choice("method.student_input", self.student_input, STUDENT_INPUTS)
        check_choice("method.fake_score", self.fake_score, FAKE_SCORES)
        check_choice("method.gan", self.gan, GANS)
        check_choice("method.adversarial_loss", self.adversarial_loss, GAN_LOSSES)
        check_range("method.dmd_min", self.dmd_min, 0.0, 0.999)
        check_range("method.dmd_max", self.dmd_max, self.dmd_min, 0.999)  # t = T does not exist
        check_range("method.critic_channels", self.critic_channels, 1)
        for key in ("dmd_weight", "adversarial_weight", "critic_weight", "student_lr", "fake_score_lr", "critic_lr"):
            check_range(f"method.{key}", getattr(self, key), 0.0)
        check_range("method.weight_decay", self.weight_decay, 0.0)
        self.rl.validate(self.num_steps)
        check_range("method.regression_weight", self.regression_weight, 0.0)
        check_range("method.regression_init", self.regression_init, 0.0, 1.0)
        check_range("method.regression_steps", self.regression_steps, 1)
        check_choice("method.solver", self.solver, ("dpmpp_2m", "ddim"))
        if len(self.adam_betas) != 2:
            raise UserError(f"method.adam_betas={self.adam_betas} is not a pair; give two values")
        self._validate_game()

    def _validate_game(self) -> None:
        """Check what the critic reads, and with which losses it goes together."""
        self._validate_image_critic()
        if not (self.dmd_weight or self.adversarial_weight):
            raise UserError("method.dmd_weight=0 and method.adversarial_weight=0 leave the student no loss")
        if self.gan == "bottleneck" and self.adversarial_weight and self.fake_score != "network":
            raise UserError(
                f"method.gan=bottleneck is the fake score's, and method.fake_score={self.fake_score} has no network; "
                "allowed here: off, dino, effnet_lite1"
            )
        if self.gan == "bottleneck" and self.adversarial_weight and self.adversarial_loss == "wgan":
            raise UserError(
                "method.adversarial_loss=wgan clips the weights of its critic, and with method.gan=bottleneck the fake "
                f"score is one; allowed here: {', '.join(name for name in GAN_LOSSES if name != 'wgan')}"
            )

    def _validate_image_critic(self) -> None:
        check_choice("method.critic_heads", self.critic_heads, HEADS)
        check_range("method.critic_crop", self.critic_crop, 0)
        check_range("method.adversarial_ratio", self.adversarial_ratio, 0.0)
        if not self.sam_layers or list(self.sam_layers) != sorted(set(self.sam_layers)) or self.sam_layers[0] < 1:
            raise UserError(f"method.sam_layers={self.sam_layers}: give numbers from 1 that rise")
        if self.critic_heads == "pooled" and self.gan in ON_IMAGES and self.critic_channels % 8:
            raise UserError(
                f"method.critic_channels={self.critic_channels} is not a multiple of 8, as method.critic_heads=pooled "
                "needs it"
            )
        if self.adversarial_ratio and (self.gan not in ON_IMAGES or not self.dmd_weight):
            raise UserError(
                f"method.adversarial_ratio={self.adversarial_ratio:g} needs method.dmd_weight above 0 and a critic on "
                f"decoded images; allowed for method.gan: {', '.join(ON_IMAGES)}"
            )


register_schema("method", "dmd2", Dmd2Config, revision=REVISION)
