"""How a metric is shown: name, unit, direction and display factor. Records hold raw values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ablations.grid import Grid


@dataclass(frozen=True)
class Column:
    """One metric as a column or an axis: a shown value is ``factor * raw value``."""

    metric: str
    label: str
    tex: str
    better: str = ""  # "min" | "max" | "" (no direction: closeness to the teacher is what counts)
    power: int = 0  # shown values are multiplied by 10**power; a negative one is a unit, which the label names
    meaning: str = ""

    @property
    def factor(self) -> float:
        return 10.0**self.power

    @property
    def arrow(self) -> str:
        return {"min": "↓", "max": "↑", "": ""}[self.better]

    @property
    def heading(self) -> str:
        """Plain-text heading, e.g. ``KD EffNet ×10³ ↓``."""
        return " ".join(filter(None, [self.label, superscript(self.power), self.arrow]))

    @property
    def tex_heading(self) -> str:
        arrow = {"min": r"$\downarrow$", "max": r"$\uparrow$", "": ""}[self.better]
        times = rf"{{\scriptsize$\times 10^{{{self.power}}}$}}" if self.power > 0 else ""
        return " ".join(filter(None, [self.tex, times, arrow]))

    @property
    def axis(self) -> str:
        """Axis label in matplotlib's mathtext."""
        times = rf"$\times 10^{{{self.power}}}$" if self.power > 0 else ""
        return " ".join(filter(None, [self.label, times, self.arrow]))


def superscript(power: int) -> str:
    """``×10³``, or nothing for power 0 and for a unit."""
    return "×10" + str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) if power > 0 else ""


_KNOWN = {
    column.metric: column
    for column in (
        Column("kd_effnet", "KD", "KD", "min", 0, "kernel distance on EfficientNet-Lite0 features"),
        Column("fd_effnet", "FD", "FD", "min", 0, "Fréchet distance on EfficientNet-Lite0 features"),
        Column(
            "kd_teacher", "KD (teacher)", "KD (teacher)", "min", 3, "kernel distance on the teacher's own bottleneck"
        ),
        Column("fid", "FID", "FID", "min", 0, "clean-fid Inception Fréchet distance"),
        Column("kid", "KID", "KID", "min", 3, "clean-fid Inception kernel distance"),
        Column("clip_score", "CLIP score", "CLIP score", "max", 0, "mean image-text cosine"),
        Column("diversity", "Diversity", "Diversity", "", 0, "mean distance among images of one prompt"),
        Column(
            "trainable_parameters", "Trainable M", "Trainable M", "", -6, "trained parameters, all players, in millions"
        ),
        Column(
            "device_hours", "Device-hours", "Device-hours", "", 0, "of training; stored teacher solutions were free"
        ),
        Column("student_evaluations", "Student evaluations", "Student evaluations", "", 0, "per training image"),
        Column("teacher_evaluations", "Teacher evaluations", "Teacher evaluations", "", 0, "per training image"),
        Column(
            "gradient_variation",
            "Gradient variation",
            "Gradient variation",
            "min",
            0,
            "sd / mean of the student's gradient norm, second half of the training",
        ),
        Column(
            "loss_variation",
            "Loss variation",
            "Loss variation",
            "min",
            0,
            "sd / mean of the student's distribution matching loss, each value of equally many updates, second half of "
            "the training",
        ),
    )
}


def column(metric: str) -> Column:
    """The display of ``metric``; one without an entry here is shown raw under its own name."""
    return _KNOWN.get(metric, Column(metric, metric, metric.replace("_", r"\_")))


def shown_column(grid: Grid, metric: str) -> Column:
    """The display of ``metric`` in ``grid``, which says what counts as best."""
    return replace(column(metric), better=grid.layout.best.get(metric, ""))
