"""Contact sheets for the cards: rows of uint8 pictures with captions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LABEL_HEIGHT = 12
MARGIN = 2


def save_sheet(
    path: Path, rows: Sequence[np.ndarray], labels: Sequence[str], zoom: int = 2, label_width: int = 250
) -> None:
    """One labelled row of pictures per entry of ``rows`` (each uint8 (n, H, W, 3)); written as PNG."""
    side = rows[0].shape[1] * zoom
    width = label_width + max(len(row) for row in rows) * (side + MARGIN)
    sheet = Image.new("RGB", (width, len(rows) * (side + MARGIN)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LABEL_HEIGHT)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = y * (side + MARGIN)
        draw.multiline_text((4, top + 4), _wrap(label, 36), fill="black", font=font)
        for x, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (label_width + x * (side + MARGIN), top))
    sheet.save(path, optimize=True)


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
