"""The forms in which a student leaves this project, and which students can take them. Torch-free."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.schema import UserError

if TYPE_CHECKING:
    from core.config import ExperimentConfig

KEYS = ("diffusers", "kohya", "comfyui")
LOADED_AS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16"}  # torch's dtypes, by storage
_NO_KOHYA = {"pixart": "PixArt", "mmdit": "Stable Diffusion 3"}  # families of whose Kohya keys diffusers has no reader
_COMFYUI_AS_DIFFUSERS = ("mmdit",)  # ComfyUI reads diffusers' own keys of these


@dataclass(frozen=True)
class Form:
    """The names of a LoRA's ``keys``, whether a whole pipeline is written (``merge``), and how weights are stored.

    ``dtype``: None keeps what the weights were trained in.
    """

    keys: str = "diffusers"
    merge: bool = False
    dtype: str | None = None

    @property
    def is_one_file(self) -> bool:
        """Whether the student is a LoRA for other programs, in a file that has its name."""
        return self.keys != "diffusers"

    def names_of(self, family: str) -> str:
        """The names that a LoRA's keys follow: kohya or diffusers."""
        if self.keys == "comfyui":
            return "diffusers" if family in _COMFYUI_AS_DIFFUSERS else "kohya"
        return self.keys

    def check(self, family: str, sharing: str) -> None:
        """UserError when students of such a backbone cannot take the form."""
        if self.is_one_file:
            self._check_keys(family, sharing)
        # diffusers reads no LoRA of PixArt, whose students are always whole
        if self.dtype == "fp8" and not self.merge and sharing == "lora" and family != "pixart":
            raise UserError("--dtype fp8 stores whole layers, not a LoRA's factors; add --merge, or give fp16 or bf16")

    def _check_keys(self, family: str, sharing: str) -> None:
        asked = f"--format {self.keys}"
        if self.merge:
            raise UserError(f"{asked} is for a LoRA, and --merge leaves none; give one of the two")
        if sharing == "full":
            raise UserError(
                f"{asked} is for a LoRA, not for whole weights (backbone.sharing=full, or a guidance_embedding); "
                "allowed: diffusers"
            )
        if family in _NO_KOHYA and self.names_of(family) == "kohya":
            more = ", comfyui" if family in _COMFYUI_AS_DIFFUSERS else ""
            raise UserError(
                f"{asked}: diffusers has no reader of such keys for {_NO_KOHYA[family]}, which could check the file; "
                f"allowed: diffusers{more}"
            )


DEFAULT = Form()


def form_of(arguments: Namespace) -> Form:
    """The form that the options of ``fewstep export`` ask for."""
    return Form(arguments.format, arguments.merge, arguments.dtype)


def check_export(config: ExperimentConfig, arguments: Namespace, run_id: str) -> None:
    """UserError when the options of ``fewstep export`` do not suit the run, known from its configuration alone."""
    if not config.method.trains:
        raise UserError(f"run {run_id} is the teacher itself: nothing to export")
    weights = arguments.weights or config.eval.weights
    if weights == "ema" and not config.train.ema_decay:
        raise UserError("weights=ema cannot be exported from this run; allowed: student, ema (train.ema_decay)")
    whole = "full" if config.backbone.guidance_embedding else config.backbone.sharing
    form_of(arguments).check(config.backbone.family, whole)
