"""Samples side by side: of one student at 1, 2 and 4 NFE (Flash Diffusion, Figure 4), and over its training.

The pictures are committed (analysis/records/pictures/, written by ``fewstep sample``; samples.json says from which
run and how); here they are only laid out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from analysis.artefacts.context import Context, Piece, figure
from analysis.looks import style

PICTURES = Path(__file__).parents[1] / "records" / "pictures"
TEXTS = {
    "figure_4": "Samples of one student at 1, 2 and 4 network evaluations beside its teacher's (after Flash Diffusion, "
    "Figure 4): same prompts and noise in every column, one seed, no picture exchanged.",
    "checkpoints": "Samples of one student over its training beside its teacher's (after FLUX.2 timestep distillation):"
    " same prompts and noise in every column, one seed, no picture exchanged.",
}
WEIGHTS = {"ema": "student (EMA)"}  # where a title says more than samples.json


def build(context: Context, folder: Path | None = None) -> Iterator[Piece]:
    """Yield the figures whose pictures are committed."""
    for name, text in TEXTS.items():
        file = (folder or PICTURES) / name / "samples.json"
        if not file.exists():
            continue
        facts = json.loads(file.read_text())
        source = f"Run {facts['run']} after {facts['images']:,} images, commit {str(facts['commit'])[:12]}."
        pictures = [file.parent / entry["file"] for entry in facts["files"]]
        yield from figure(name, draw, file.parent, facts["files"], caption=f"{text} {source}", reads=pictures)


def draw(folder: Path, entries: list[dict[str, Any]]) -> Figure:
    """Draw one row for each prompt and one column for each setting."""
    prompts = list(dict.fromkeys(entry["prompt"] for entry in entries))
    columns = {entry["setting"]: _title(entry) for entry in entries}
    settings = list(columns)
    with style():
        figure = Figure(figsize=(0.9 + 0.62 * len(settings), 0.4 + 0.6 * len(prompts)))
        axes = figure.subplots(len(prompts), len(settings), squeeze=False)
        for entry in entries:
            ax = axes[prompts.index(entry["prompt"])][settings.index(entry["setting"])]
            ax.imshow(_pixels(folder / entry["file"]), interpolation="lanczos")
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, title in zip(axes[0], columns.values(), strict=True):
            ax.set_title(title, fontsize=6, linespacing=1.1)
        for row, prompt in zip(axes, prompts, strict=True):
            row[0].set_ylabel(_wrapped(prompt), rotation=0, ha="right", va="center", fontsize=6)
    return figure


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def _title(entry: Mapping[str, Any]) -> str:
    """The heading of a column: weights, steps, training images, on two or three lines, as columns are narrow."""
    steps, guidance, images = entry["steps"], entry["guidance"], entry.get("images")
    how = f"{steps} step{'s' if steps > 1 else ''}"
    if guidance != 1.0:
        how += f", w = {guidance:g}"
    if images is not None:
        how += f"\n{images:,} images" if images else "\nbefore training"
    return f"{WEIGHTS.get(entry['weights'], entry['weights'])}\n{how}"


def _wrapped(prompt: str, width: int = 16) -> str:
    lines, line = [], ""
    for word in prompt.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])
