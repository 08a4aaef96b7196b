"""The rows of the table of ``fewstep bench``: what is timed, and what is wanted. Torch-free: pages read it too."""

from __future__ import annotations

from dataclasses import dataclass

RATIO, SECONDS, SPEED = "ratio", "seconds", "speed"


@dataclass(frozen=True)
class Row:
    """One line of the table; ``wanted``: images/s of ours / of the reference at least, or seconds at most, or None."""

    name: str
    work: str
    wanted: float | None
    kind: str = RATIO

    def reached(self, value: float) -> bool:
        """Whether a measured value is as wanted."""
        if self.wanted is None:
            return True
        return value >= self.wanted if self.kind == RATIO else value < self.wanted


ROWS = (
    Row("flash_fp32", "Flash Diffusion step, K=32, fp32, against the official step", 3.0),
    Row("flash_bf16", "Flash Diffusion step, K=32, bf16, against the official step", 3.0),
    Row("dmd2_full", "DMD2 step with GAN, fp32, all parameters, against the official step", 1.5),
    Row("dmd2_attention", "DMD2 step with GAN, fp32, LoRA on attention, against the official step", 1.5),
    Row("dmd2_all", "DMD2 step with GAN, fp32, LoRA on all layers, against the official step", 1.5),
    Row("fastgen_full", "DMD2 step with GAN, fp32, all parameters, against FastGen's step", 1.5),
    Row("fastgen_lora", "DMD2 step with GAN, fp32, LoRA on attention, against FastGen's step", 1.5),
    Row("sampling_full", "Sampling, 4 steps, batch 64, bf16, all parameters, against a diffusers pipeline", 1.2),
    Row("sampling_lora", "Sampling, 4 steps, batch 64, bf16, LoRA on all layers, against a diffusers pipeline", 1.2),
    Row("grid_status", "`grid status` over 1,000 run folders", 1.0, SECONDS),
    Row("grid_plan", "`grid plan` over 1,000 run folders", 2.0, SECONDS),
    Row("table", "`table` over 1,000 runs", 1.5, SECONDS),
    Row("results", "`results`: all tables and figures from the records", 10.0, SECONDS),
    Row("first_step", "From `fewstep train` to the first step, everything cached", 6.0, SECONDS),
)

BLOCKS = (  # on a GPU alone
    Row("flux2_klein", "Blocks of FLUX.2 klein, 1024 pixels, bf16", None, SPEED),
    Row("flux2_dev", "Blocks of FLUX.2 dev, 1024 pixels, bf16", None, SPEED),
)
