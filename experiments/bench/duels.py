"""Pairs that are measured: our training steps and pictures against the references'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from core.config import ExperimentConfig, compose, resolve
from core.data.requests import Requests
from core.sampler import Setting
from experiments.bench.contest import Duel, Side
from experiments.bench.references.dmd2 import Dmd2Reference
from experiments.bench.references.fastgen import FastGenReference
from experiments.bench.references.flash import FlashReference
from experiments.bench.references.networks import Adapters, Examples, shared_by_batch
from experiments.bench.references.pipeline import PipelineReference
from experiments.bench.step import Period
from experiments.build import DTYPES, build_backbone, build_method, source_of
from experiments.session import Session

BATCH = 4  # as the papers have it on one GPU
STAGE = 0.9  # of the budget: every loss is on
NUM_TIMESTEPS = 32  # K of Flash Diffusion
RANK = 32
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LAYERS = (  # what DMD2's release adapts
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
SAMPLES, SAMPLING_STEPS = 64, 4


def flash_duel(folder: Path, precision: str) -> Duel:
    """Adapters on attention, all three losses, the release's pi(t); the reference's start is the mean of ours."""
    release = [f"method.num_timesteps={NUM_TIMESTEPS}", "method.mixture_variance=0.25"]
    config = configured("flash/emoji", folder, [*release, f"train.precision={precision}", *lora(ATTENTION)])
    period = Period(config, folder, STAGE)
    dtype = None if precision == "fp32" else DTYPES[precision]
    adapters, device = adapters_on(ATTENTION), period.backbone.device
    reference = FlashReference(source_of(config), adapters, dtype, NUM_TIMESTEPS, device)
    method = period.trainer.method
    pmf = method.pmf(period.clock)
    period.choose(lambda positions: method._starts(positions, pmf), float(pmf @ np.arange(NUM_TIMESTEPS)))
    starts = [method._starts(positions, pmf).tolist() for positions in period.positions()]
    batches = list(zip(examples_of(period), shared_by_batch(starts), strict=True))

    def run() -> None:
        for examples, start in batches:
            reference.step(examples, start)

    return step_duel(period, run, reference.evaluations)


def dmd2_duel(folder: Path, targets: Sequence[str]) -> Duel:
    """A whole period of five iterations; ``targets`` of the student's adapters, none: it trains in full."""
    period = Period(configured("dmd2/emoji", folder, ["train.precision=fp32", *lora(targets)]), folder, STAGE)
    source, device = source_of(period.trainer.config), period.backbone.device
    reference = Dmd2Reference(source, adapters_on(targets), device)
    method = period.trainer.method
    period.choose(method._steps, (method.config.num_steps - 1) / 2)
    stops = [method._steps(positions).tolist() for positions in period.positions()]
    batches = list(zip(examples_of(period), shared_by_batch(stops), strict=True))

    def run() -> None:
        for number, (examples, stop) in enumerate(batches):
            reference.iteration(number, examples, stop)

    return step_duel(period, run, reference.evaluations)


def fastgen_duel(folder: Path, targets: Sequence[str]) -> Duel:
    """Our period against as many updates: one of the student and five of the critics, six iterations there."""
    words = ["method.student_input=noised_data", "train.precision=fp32", *lora(targets)]
    period = Period(configured("dmd2/emoji", folder, words), folder, STAGE)
    source, device = source_of(period.trainer.config), period.backbone.device
    reference = FastGenReference(source, adapters_on(targets), device)
    batches = examples_of(period)
    batches.insert(0, batches[0])  # the student's update takes an iteration of its own

    def run() -> None:
        for number, examples in enumerate(batches):
            reference.iteration(number, examples)

    return step_duel(period, run, reference.evaluations)


def step_duel(period: Period, run: Callable[[], None], evaluations: Counter[str]) -> Duel:
    """A period of ours against ``run``, which trains on the same images."""
    precision = period.trainer.config.train.precision
    ours = Side(lambda repeat: period.run(), period.backbone.evaluations)
    reference = Side(lambda repeat: run(), evaluations)
    return Duel(ours, reference, period.images, period.backbone.device, period.recorder, precision)


def sampling_duel(folder: Path, targets: Sequence[str]) -> Duel:
    """Pictures from prompts; each repeat has prompts of its own, so that none is encoded already."""
    words = ["train.precision=bf16", f"eval.batch_size={SAMPLES}", *lora(targets)]
    config = configured("flash/emoji", folder, words)
    backbone = build_backbone(config)
    session = Session(config, build_method(config, backbone, training=False), 0)
    reference = PipelineReference(source_of(config), adapters_on(targets), backbone.device)
    setting = Setting("student", config.eval.sampler_at(SAMPLING_STEPS))
    made: Counter[str] = Counter()

    def ours(repeat: int) -> None:
        made.update(session.sample(Requests(prompts(repeat)), setting).cost.evaluations)

    theirs = Side(lambda repeat: reference.sample(prompts(repeat), SAMPLING_STEPS), reference.evaluations)
    return Duel(Side(ours, made), theirs, SAMPLES, backbone.device)


def prompts(repeat: int) -> tuple[str, ...]:
    """Different texts for all pictures, others in each repeat."""
    numbers = range(repeat * SAMPLES, (repeat + 1) * SAMPLES)
    return tuple(f"red apple {number}" for number in numbers)


def configured(experiment: str, folder: Path, words: Sequence[str]) -> ExperimentConfig:
    """An experiment with the batch of this table, and no moving average, which the references have not."""
    fixed = [f"train.batch_size={BATCH}", "train.ema_decay=0", f"execution.runs_dir={folder}"]
    return resolve(compose(experiment, [*fixed, *words]))


def lora(targets: Sequence[str]) -> list[str]:
    """Settings of adapters on ``targets``; none: copies that train in full."""
    if not targets:
        return ["backbone.sharing=full"]
    rank = [f"backbone.lora_rank={RANK}", f"backbone.lora_alpha={RANK}"]
    return ["backbone.sharing=lora", *rank, f"backbone.lora_targets=[{','.join(targets)}]"]


def adapters_on(targets: Sequence[str]) -> Adapters | None:
    """The reference's adapters on the same modules."""
    return Adapters(RANK, tuple(targets)) if targets else None


def examples_of(period: Period) -> list[Examples]:
    """The batches of a period as the references take them."""
    found = []
    for positions in period.positions():
        batch = period.trainer.data.batch(positions)
        found.append(Examples(batch.x0, batch.cond.tensors["text"], batch.null.tensors["text"]))
    return found


DUELS: dict[str, Callable[[Path], Duel]] = {
    "flash_fp32": partial(flash_duel, precision="fp32"),
    "flash_bf16": partial(flash_duel, precision="bf16"),
    "dmd2_full": partial(dmd2_duel, targets=()),
    "dmd2_attention": partial(dmd2_duel, targets=ATTENTION),
    "dmd2_all": partial(dmd2_duel, targets=ALL_LAYERS),
    "fastgen_full": partial(fastgen_duel, targets=()),
    "fastgen_lora": partial(fastgen_duel, targets=ATTENTION),
    "sampling_full": partial(sampling_duel, targets=()),
    "sampling_lora": partial(sampling_duel, targets=ALL_LAYERS),
}
