"""Contact sheets: one row per prompt, one labelled column per way of sampling."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL_WIDTH, FONT_SIZE = 4, 150, 13
INK, PAPER = (20, 20, 20), (255, 255, 255)


def contact_sheet(
    rows: Sequence[str], columns: Sequence[str], images: np.ndarray, cell: int | None = None
) -> Image.Image:
    """Draw images (R, C, H, W, 3) uint8 with row labels on the left and column labels on top.

    ``cell`` is the side of a drawn image in pixels; by default the smallest multiple of the image's own that is at
    least 96.
    """
    assert images.shape[:2] == (len(rows), len(columns)), (images.shape, len(rows), len(columns))
    cell = cell or images.shape[3] * -(-96 // images.shape[3])
    font = ImageFont.load_default(FONT_SIZE)
    header = [_wrap(label, cell, font) for label in columns]
    top = 2 * MARGIN + (FONT_SIZE + 3) * max(label.count("\n") + 1 for label in header)
    step = cell + MARGIN
    size = (LABEL_WIDTH + MARGIN + step * len(columns), top + step * len(rows))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, label in enumerate(header):
        x = LABEL_WIDTH + MARGIN + step * c + cell // 2
        draw.multiline_text((x, top - MARGIN), label, INK, font, anchor="md", align="center", spacing=3)
    for r, label in enumerate(rows):
        y = top + step * r
        text = _wrap(label, LABEL_WIDTH - MARGIN, font)
        draw.multiline_text((MARGIN, y + cell // 2), text, INK, font, anchor="lm", spacing=3)
        for c in range(len(columns)):
            picture = Image.fromarray(images[r, c]).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(picture, (LABEL_WIDTH + MARGIN + step * c, y))
    return sheet


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Break ``text`` into lines that fit ``width`` pixels."""
    characters = max(4, int(width / font.getlength("n")))
    return "\n".join(textwrap.wrap(text, characters)) or text


def sheets(path: Path) -> list[Path]:
    """The sample sheets of a run folder or record, the oldest first; they are named by training images."""
    files = (path / "samples").glob("*")
    return sorted(file for file in files if file.suffix in (".png", ".webp") and file.stem.isdigit())


def newest_sheet(path: Path) -> Path | None:
    """The last sample sheet of a run folder or record."""
    return max(sheets(path), default=None)
