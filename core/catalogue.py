"""The catalogue of what can be measured: every metric that judges pictures, every reading of a training's log.

A metric is one row here and one formula, registered under the row's ``estimator`` (core/metrics/measure.py). The
choices of configurations and grids, columns of tables, directions and the glossary derive from the rows. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How a number is called and shown. A shown value is 10**``power`` times the raw one.

    ``better`` is min, max, or empty where neither is better. A negative power is a unit, which the label names.
    """

    name: str
    label: str
    meaning: str
    better: str = ""
    power: int = 0


@dataclass(frozen=True)
class Judge:
    """A network that judges pictures and never trains anything; ``weights`` says where its weights come from.

    ``path`` is the setting of ``eval`` that names them, ``needed`` the line for a user who has not set it; without one
    the project brings them.
    """

    name: str
    network: str
    weights: str
    path: str = ""
    needed: str = ""


@dataclass(frozen=True, kw_only=True)
class Metric(Quantity):
    """A number that a judge gives to generated pictures.

    ``estimator`` is the formula, as protocols record it. ``resolves`` says what the number can tell and what it cannot.
    ``grouped`` metrics look at several pictures of one prompt. A figure draws the metric ``drawn_instead`` where both
    were measured.
    """

    judge: Judge
    estimator: str
    resolves: str
    needs_reference: bool = False
    grouped: bool = False
    drawn_instead: str = ""


METRICS: dict[str, Metric] = {}
READINGS: dict[str, Quantity] = {}
REPORTED: dict[str, Quantity] = {}


def register_metric(metric: Metric) -> Metric:
    """Add a row; from now on the metric is a choice of configurations and grids, a column, and in the glossary."""
    assert metric.name not in METRICS and metric.name not in READINGS, metric.name
    assert metric.better in ("min", "max", ""), metric.better
    METRICS[metric.name] = metric
    return metric


def register_reading(reading: Quantity) -> Quantity:
    """Add a number that is read from a training's log (analysis/training.py) instead of measured on pictures."""
    assert reading.name not in METRICS and reading.name not in READINGS, reading.name
    READINGS[reading.name] = reading
    return reading


def register_reported(reported: Quantity) -> Quantity:
    """Add a number that stands in papers alone (analysis/published.csv): nothing here measures or reads it."""
    assert reported.name not in {*METRICS, *READINGS, *REPORTED}, reported.name
    REPORTED[reported.name] = reported
    return reported


# Formulas, in the words of the protocols.
KERNEL = "mmd2 unbiased, cubic polynomial kernel, all pairs"
FRECHET = "frechet, unbiased covariances, symmetric eigenvalues"
MEAN_COSINE = "mean cosine of image and prompt"
PAIRWISE_DISTANCE = "mean pairwise cosine distance within a prompt, then mean over prompts"

EFFNET = Judge("effnet", "EfficientNet-Lite0", "of the installed wheel, or `eval.extractor_path`", "extractor_path")
TEACHER_FEATURES = Judge("teacher", "bottleneck of the distilled teacher", "the teacher's own")
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION = Judge(
    "inception",
    "clean-fid's Inception-v3",
    "`eval.inception_path`",
    "inception_path",
    f"fid and kid need eval.inception_path: the file {INCEPTION_FILE} that clean-fid downloads",
)
CLIP = Judge(
    "clip",
    "an open_clip model",
    "embedded at emoji scale, else `eval.clip_path`",
    "clip_path",
    "clip_score needs eval.clip_path: an open_clip folder, NAME:FILE, or ViT-bigG-14",
)

KD_EFFNET = register_metric(
    Metric(
        name="kd_effnet",
        label="Kernel distance",
        meaning="on EfficientNet-Lite0 features",
        better="min",
        judge=EFFNET,
        estimator=KERNEL,
        resolves="unbiased, so few pictures do: over noise seeds the sd of the emoji teacher's is 0.05 at 4 steps and "
        "0.22 at one (N = 192)",
        needs_reference=True,
    )
)
FD_EFFNET = register_metric(
    Metric(
        name="fd_effnet",
        label="Fréchet distance",
        meaning="on EfficientNet-Lite0 features",
        better="min",
        judge=EFFNET,
        estimator=FRECHET,
        resolves="biased upwards by few pictures: compares equally many alone",
        needs_reference=True,
        drawn_instead=KD_EFFNET.name,
    )
)
KD_TEACHER = register_metric(
    Metric(
        name="kd_teacher",
        label="Kernel distance (teacher)",
        meaning="on the teacher's own bottleneck",
        better="min",
        power=3,
        judge=TEACHER_FEATURES,
        estimator=KERNEL,
        resolves="a second opinion that knows nothing of ImageNet; for students of one teacher alone",
        needs_reference=True,
    )
)
KID = register_metric(
    Metric(
        name="kid",
        label="KID",
        meaning="clean-fid Inception kernel distance",
        better="min",
        power=3,
        judge=INCEPTION,
        estimator=KERNEL,
        resolves="unbiased, so few pictures do",
        needs_reference=True,
    )
)
FID = register_metric(
    Metric(
        name="fid",
        label="FID",
        meaning="clean-fid Inception Fréchet distance",
        better="min",
        judge=INCEPTION,
        estimator=FRECHET,
        resolves="the papers' number; biased upwards by few pictures: compares equally many alone",
        needs_reference=True,
    )
)
CLIP_SCORE = register_metric(
    Metric(
        name="clip_score",
        label="CLIP score",
        meaning="mean image-text cosine",
        better="max",
        judge=CLIP,
        estimator=MEAN_COSINE,
        resolves="whether a picture shows what its prompt says, not whether it looks real",
    )
)
DIVERSITY = register_metric(
    Metric(
        name="diversity",
        label="Diversity",
        meaning="mean distance among images of one prompt",
        better="max",
        judge=EFFNET,
        estimator=PAIRWISE_DISTANCE,
        resolves="collapse to one picture of a prompt; broken pictures differ, too: the teacher's own is the mark",
        grouped=True,
    )
)
STANDARD = (KD_EFFNET.name, FD_EFFNET.name, CLIP_SCORE.name, DIVERSITY.name)
"""What is measured where a configuration does not say: needs no weights beside those that the project brings."""

TRAINABLE_PARAMETERS = register_reading(
    Quantity(
        name="trainable_parameters",
        label="Trainable parameters (M)",
        meaning="of all players, in millions",
        power=-6,
    )
)
DEVICE_HOURS = register_reading(
    Quantity(
        name="device_hours",
        label="Device-hours",
        meaning="of training; stored teacher solutions were free",
    )
)
STUDENT_EVALUATIONS = register_reading(
    Quantity(name="student_evaluations", label="Student evaluations", meaning="per training image")
)
TEACHER_EVALUATIONS = register_reading(
    Quantity(name="teacher_evaluations", label="Teacher evaluations", meaning="per training image")
)
GRADIENT_VARIATION = register_reading(
    Quantity(
        name="gradient_variation",
        label="Gradient variation",
        meaning="sd / mean of the student's gradient norm, second half of the training",
        better="min",
    )
)
LOSS_VARIATION = register_reading(
    Quantity(
        name="loss_variation",
        label="Loss variation",
        meaning="sd / mean of the student's distribution matching loss, each value of equally many updates, second "
        "half of the training",
        better="min",
    )
)
GPU_HOURS_H100 = register_reported(
    Quantity(
        name="gpu_hours_h100",
        label="GPU-hours (H100)",
        meaning="of training, as the paper states them",
    )
)
