"""Draw samples of a run for given prompts: single images, and a contact sheet beside the teacher's."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.config import UserError
from core.data.prompts import PromptList, parse_prompts
from core.provenance import provenance
from core.run import atomic_folder
from experiments.build import Session, Setting
from experiments.evaluate import Split, settings
from experiments.sheet import contact_sheet, label
from experiments.target import load_target

NUM_DEFAULT_PROMPTS = 8


@dataclass(frozen=True)
class Request:
    """What to draw: every prompt with every seed, at every setting."""

    prompts: PromptList
    seeds: tuple[int, ...]
    settings: tuple[Setting, ...]


def default_prompts(session: Session) -> PromptList:
    """Captions of the last split that is evaluated (held out where there is one)."""
    split = Split(session.config, session.config.eval.splits[-1])
    return split.prompts.distinct(NUM_DEFAULT_PROMPTS)


def default_settings(
    session: Session, steps: Sequence[int] | None, weights: str | None, teachers: Sequence[Setting]
) -> tuple[Setting, ...]:
    """The teacher first (as often as asked for), then the run's own weights at each number of steps."""
    own = settings(session.config)
    if steps:
        own = [replace(own[0], steps=k) for k in steps]
    if weights and session.config.method.trains:
        own = [replace(setting, weights=weights) for setting in own]
    return (*teachers, *own)


def sample(session: Session, request: Request, out: Path, run_id: str) -> Path:
    """Write ``sheet.png``, one PNG per sample and ``samples.json`` to ``out``; returns the sheet's path.

    samples.json: the run, its training images, the commit, and of every picture how it was made.
    """
    images = draw(session, request)
    num_prompts, num_seeds = len(request.prompts), len(request.seeds)
    files = []
    with atomic_folder(out) as folder:
        for p, prompt in enumerate(request.prompts.prompts):
            for s, seed in enumerate(request.seeds):
                for c, setting in enumerate(request.settings):
                    name = f"{p:03d}-{_slug(prompt)}-seed{seed}-{setting.weights}-{setting.steps}.png"
                    Image.fromarray(images[p, s, c]).save(folder / name)
                    how = {"setting": label(setting), **setting.__dict__}
                    files.append({"file": name, "prompt": prompt, "seed": seed, **how})
        rows = [_row_label(text, seed, num_seeds) for text in request.prompts.prompts for seed in request.seeds]
        columns = [label(setting) for setting in request.settings]
        grid = images.reshape(num_prompts * num_seeds, len(columns), *images.shape[3:])
        contact_sheet(rows, columns, grid).save(folder / "sheet.png")
        facts = {"run": run_id, "images": session.images, "commit": provenance(session.config)["commit"]}
        (folder / "samples.json").write_text(json.dumps(facts | {"files": files}, indent=1) + "\n")
    return out / "sheet.png"


def draw(session: Session, request: Request) -> np.ndarray:
    """Samples (prompts, seeds, settings, H, W, 3) uint8; one seed has the same noise in every setting."""
    return np.stack(
        [
            np.stack(
                [session.sample(request.prompts.prompts, setting, seed) for setting in request.settings],
                axis=1,
            )
            for seed in request.seeds
        ],
        axis=1,
    )


def _row_label(prompt: str, seed: int, num_seeds: int) -> str:
    return prompt if num_seeds == 1 else f"{prompt} (seed {seed})"


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"


def run_command(arguments: Namespace) -> int:
    """``fewstep sample RUN``: draw and print where the sheet is."""
    prompts = parse_prompts(arguments.prompts) if arguments.prompts else None
    for option, values in (("--steps", arguments.steps or [1]), ("--teacher-steps", arguments.teacher_steps)):
        if min(values) < (option == "--steps"):
            raise UserError(f"{option} {min(values)} is not a number of steps; give at least 1")
    session, run = load_target(arguments.target, arguments.overrides, arguments.runs_dir)
    prompts = prompts or default_prompts(session)
    guidance = arguments.teacher_guidance
    teachers = [Setting("teacher", "dpmpp_2m", steps, guidance) for steps in arguments.teacher_steps if steps]
    chosen = default_settings(session, arguments.steps, arguments.weights, teachers)
    request = Request(prompts, tuple(arguments.seeds), chosen)
    out = Path(arguments.out) if arguments.out else run.path / "samples" / f"prompts-{prompts.hash}"
    print(sample(session, request, out, run.id))
    return 0
