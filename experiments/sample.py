"""Draw samples of a run for given requests: single images, and a contact sheet beside the teacher's."""

from __future__ import annotations

import itertools
import json
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import UserError
from core.data.requests import Requests
from core.provenance import provenance
from core.run import Run, atomic_folder
from core.sampler import Setting, teacher_setting
from core.tasks.given import given_requests
from experiments.build import build_task
from experiments.session import Session, load_snapshot, sheet_requests
from experiments.sheet import contact_sheet
from experiments.target import load_target, open_target


@dataclass(frozen=True)
class Column:
    """One way of sampling. ``images``: after how many training images; None: at the weights that are loaded."""

    setting: Setting
    images: int | None = None

    @property
    def label(self) -> str:
        moment = "" if self.images is None else f" after {self.images:,} images"
        return self.setting.label + moment

    @property
    def suffix(self) -> str:
        """The part of a file's name that tells this column from another."""
        name = f"{self.setting.weights}-{self.setting.sampler.steps}"
        return name if self.images is None else f"{name}-{self.images}"

    def facts(self) -> dict[str, Any]:
        """How its pictures were made, for samples.json."""
        facts = {"setting": self.label, "weights": self.setting.weights, **asdict(self.setting.sampler)}
        return facts if self.images is None else facts | {"images": self.images}


@dataclass(frozen=True)
class Sheet:
    """Pictures to draw: every request with every seed, in every column."""

    requests: Requests
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]

    @property
    def rows(self) -> list[tuple[str, int]]:
        """The prompt and the seed of each row of the sheet."""
        return list(itertools.product(self.requests.texts, self.seeds))


def default_columns(
    session: Session,
    steps: Sequence[int] | None,
    weights: str | None,
    teachers: Sequence[Setting],
    moments: Sequence[int] = (),
) -> tuple[Column, ...]:
    """The columns of a sheet: the teachers first, then the run's own weights at each moment and number of steps.

    ``steps`` and ``weights`` replace those of the evaluation; ``moments`` are training images, none: now.
    """
    own = session.config.settings()
    if steps:
        own = [replace(own[0], sampler=replace(own[0].sampler, steps=count)) for count in steps]
    if weights and session.config.method.trains:
        own = [replace(setting, weights=weights) for setting in own]
    columns = [Column(setting) for setting in teachers]
    for images in moments or [None]:
        columns.extend(Column(setting, images) for setting in own)
    return tuple(columns)


def sample(session: Session, sheet: Sheet, out: Path, run: Run) -> Path:
    """Write ``sheet.png``, one PNG per sample and ``samples.json`` to ``out``; returns the sheet's path.

    samples.json: the run, its training images, the commit, and of every picture how it was made.
    """
    images = draw(session, sheet, run)
    grid = images.reshape(len(sheet.rows), len(sheet.columns), *images.shape[3:])
    with atomic_folder(out) as folder:
        files = _save_pictures(folder, sheet, grid)
        rows = [_row_label(prompt, seed, len(sheet.seeds)) for prompt, seed in sheet.rows]
        contact_sheet(rows, [column.label for column in sheet.columns], grid).save(folder / "sheet.png")
        facts = {"run": run.id, "images": session.images, "commit": provenance(session.config)["commit"]}
        (folder / "samples.json").write_text(json.dumps(facts | {"files": files}, indent=1) + "\n")
    return out / "sheet.png"


def _save_pictures(folder: Path, sheet: Sheet, grid: np.ndarray) -> list[dict[str, Any]]:
    """One PNG for each picture of grid (rows, columns, H, W, 3); returns their entries for samples.json."""
    files = []
    for row, (prompt, seed) in enumerate(sheet.rows):
        number = row // len(sheet.seeds)
        for pixels, column in zip(grid[row], sheet.columns, strict=True):
            name = f"{number:03d}-{_slug(prompt)}-seed{seed}-{column.suffix}.png"
            Image.fromarray(pixels).save(folder / name)
            files.append({"file": name, "prompt": prompt, "seed": seed, **column.facts()})
    return files


def draw(session: Session, sheet: Sheet, run: Run) -> np.ndarray:
    """Samples (prompts, seeds, columns, H, W, 3) uint8; one seed has the same noise in every column."""
    columns = []
    for column in sheet.columns:
        if column.images not in (None, session.images):
            load_snapshot(session, run, column.images)
        drawn = [session.sample(sheet.requests, column.setting, seed).images for seed in sheet.seeds]
        columns.append(np.stack(drawn, axis=1))
    return np.stack(columns, axis=2)


def _row_label(prompt: str, seed: int, num_seeds: int) -> str:
    return prompt if num_seeds == 1 else f"{prompt} (seed {seed})"


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"


def run_command(arguments: Namespace) -> int:
    """``fewstep sample RUN``: draw and print where the sheet is."""
    _check_steps("--steps", arguments.steps or [], least=1)
    _check_steps("--teacher-steps", arguments.teacher_steps, least=0)
    moments = sorted(arguments.at)
    if moments and moments[0] < 0:
        raise UserError(f"--at {moments[0]} is not a number of training images; give at least 0")
    first = moments[0] if moments else None
    run = open_target(arguments.target, arguments.overrides, arguments.runs_dir)
    requests = given_requests(arguments.prompts, build_task(run.config)) if arguments.prompts else None
    session = load_target(run, first)
    requests = requests or sheet_requests(session.config, session.task)
    guidance = arguments.teacher_guidance
    teachers = [teacher_setting(steps, guidance) for steps in arguments.teacher_steps if steps]
    chosen = default_columns(session, arguments.steps, arguments.weights, teachers, moments)
    sheet = Sheet(requests, tuple(arguments.seeds), chosen)
    out = Path(arguments.out) if arguments.out else run.path / "samples" / f"prompts-{requests.hash}"
    print(sample(session, sheet, out, run))
    return 0


def _check_steps(option: str, counts: Sequence[int], least: int) -> None:
    """Raise UserError for the smallest of ``counts`` if it is below ``least``."""
    smallest = min(counts, default=least)
    if smallest < least:
        raise UserError(f"{option} {smallest} is not a number of steps; give at least 1")
