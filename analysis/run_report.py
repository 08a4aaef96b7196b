"""One self-contained HTML page for a single run: while it trains, when the page loads itself again, and afterwards."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.columns import column
from analysis.keep_records import thin
from analysis.log_curves import WIDE, log_curves
from analysis.looks import inline_svg
from analysis.report import COST_NOTE, STORED, html_template, origin, sheet_uri
from core.config import ExperimentConfig, to_yaml
from core.metrics.cost import amount, training_cost
from core.run import Run, atomic_write
from core.splits import captions
from experiments.sheet import sheets

REFRESH_S = 30
MAX_SHEETS = 12
LOG_LINES = 25
RUNNING = "running"


@dataclass(frozen=True)
class Progress:
    """How far a run is; ``fraction`` of its budget, and what else is known in words."""

    state: str
    fraction: float
    facts: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """Numbers of a run: a heading for each column, and for each moment (training images) its lines."""

    heads: list[str]
    moments: dict[int, list[list[str]]]


def write_report(run: Run, path: Path) -> bool:
    """Write the page of a run to ``path``; whether the run was still training."""
    state = run.state()
    atomic_write(path, build_run_report(run))
    return state == RUNNING


def build_run_report(run: Run) -> str:
    """The page of one run: what it is, how far, its curves, pictures, numbers and cost."""
    lines = run.metrics()
    progress = progress_of(run, lines)
    measured = measured_of(run.evals())
    return html_template("run.html.j2").render(
        run=run,
        progress=progress,
        refresh_s=REFRESH_S if progress.state == RUNNING else None,
        settings=settings_of(run.config),
        curves=_curves(lines),
        wide=WIDE,
        sheets=list(_sheets(run, measured)),
        measured=measured,
        cost=_cost(lines),
        cost_note=COST_NOTE,
        attempts=run.attempts(),
        origin=origin(run.provenance()),
        configuration=to_yaml(run.config),
        log=_last_lines(run.path / "log.txt"),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def progress_of(run: Run, lines: Sequence[Mapping[str, Any]]) -> Progress:
    """State and progress of a run from its log and its heartbeat."""
    state, budget, beat = run.state(), run.config.train.budget, run.last_heartbeat() or {}
    facts: dict[str, str] = {}
    if state == "planned" and run.attempts():
        state = "stopped"
    fraction = float(state == "done")
    if run.config.method.trains:
        reached = amount(lines[-1], budget.unit) if lines else 0
        fraction = min(reached / budget.amount, 1.0)
        facts["progress"] = f"{reached:,} of {budget.amount:,} {budget.unit}"
    if state == RUNNING:
        facts |= {key: str(beat[key]) for key in ("reading", "measuring") if key in beat}
        remaining = _remaining_s(run, fraction, lines, beat)
        if remaining is not None:
            facts["time left"] = f"about {duration(remaining)}"
    if lines:
        facts["speed"] = f"{lines[-1]['images_per_s']:g} images/s"
        facts["trained for"] = duration(lines[-1]["seconds"] / (run.noted("processes") or 1))
    if state != RUNNING and run.reason():
        facts["reason"] = run.reason()
    return Progress(state, fraction, facts)


def _remaining_s(
    run: Run, fraction: float, lines: Sequence[Mapping[str, Any]], beat: Mapping[str, Any]
) -> float | None:
    """Seconds until the training ends: as its last heartbeat said, else by its speed so far; None before any."""
    if "eta_s" in beat:
        return max(beat["eta_s"] - (time.time() - beat["time"]), 0)
    if not lines or not 0 < fraction < 1:
        return None
    return (1 - fraction) / fraction * lines[-1]["seconds"] / (run.noted("processes") or 1)


def duration(seconds: float) -> str:
    """A duration in words that a reader takes in at once: ``40 s``, ``12 min``, ``3 h 20 min``, ``2 d 5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def settings_of(config: ExperimentConfig) -> dict[str, str]:
    """The settings by which a reader tells one run from another, under their own keys."""
    backbone, data, train, method = config.backbone, config.data, config.train, config.method
    adapters = f"{backbone.sharing}, rank {backbone.lora_rank}" if backbone.sharing == "lora" else backbone.sharing
    rates = {f"method.{key}": f"{value:g}" for key, value in vars(method).items() if key.endswith("_lr") and value}
    found = {
        "method": method.name,
        "backbone.path": backbone.path,
        "backbone.sharing": adapters,
        "data.path": f"{data.path} ({data.view}, {data.image_size} pixels)",
        "seed": str(config.seed),
    }
    if method.trains:
        found |= {
            "train.budget": f"{train.budget.amount:,} {train.budget.unit}",
            "train.batch_size": str(train.batch_size),
            "train.precision": train.precision,
            "train.ema_decay": f"{train.ema_decay:g}",
            **rates,
            "eval": f"{config.eval.weights}, {config.eval.sampler}, {config.eval.steps} steps",
        }
    return found | ({"train.init_from": train.init_from} if train.init_from else {})


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """The curves of the run's log as ``<svg>``, or nothing before its first line."""
    figure = log_curves([("", 0, pd.DataFrame(lines))], ["images_per_s"], log_axis=True) if lines else None
    return "" if figure is None else inline_svg(figure)


def _sheets(run: Run, measured: Measured) -> Iterator[dict[str, Any]]:
    """The sheets, the newest first, each with what was measured at its moment."""
    for file in reversed(thin(sheets(run.path), MAX_SHEETS)):
        images = int(file.stem)
        uri = _uri(file, file.stat().st_mtime_ns)
        yield {"images": images, "uri": uri, "lines": measured.moments.get(images, [])}


@functools.lru_cache(maxsize=64)
def _uri(file: Path, changed_ns: int) -> str:
    """``sheet_uri``, made once while a page is written again and again."""
    return sheet_uri(file)


def measured_of(evals: Sequence[Mapping[str, Any]]) -> Measured:
    """The values that were measured so far, the newest moment first, in units of the catalogue's columns."""
    shown = [column(name) for name in dict.fromkeys(line["metric"] for line in evals)]
    values: dict[tuple[Any, ...], dict[str, float]] = {}
    for line in sorted(evals, key=lambda line: -line["images"]):
        key = (line["images"], line["split"], line["weights"], line["steps"], line["nfe"])
        values.setdefault(key, {})[line["metric"]] = line["value"]
    moments: dict[int, list[list[str]]] = {}
    for (images, split, *rest), known in values.items():
        cells = [f"{one.factor * known[one.metric]:.4g}" if one.metric in known else "" for one in shown]
        line = [captions(split), *map(str, rest), *cells]
        moments.setdefault(images, []).append(line)
    return Measured(["prompts", "weights", "steps", "NFE", *(one.heading for one in shown)], moments)


def _cost(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The cost of the training so far: images, device-hours, and network evaluations by role."""
    cost = training_cost(lines)
    evaluations = cost.evaluations | ({STORED: cost.stored} if cost.stored else {})
    roles = {role: f"{count:,}" for role, count in evaluations.items()}
    return {"images": f"{cost.images:,}", "device-hours": f"{cost.device_hours:.3g}"} | roles if lines else {}


def _last_lines(file: Path) -> str:
    try:
        return "\n".join(file.read_text(errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ""
