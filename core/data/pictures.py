"""Encoded pictures to arrays, whatever cameras and programs have written. Torch-free."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class BadPicture(ValueError):
    """The reason why a picture cannot be decoded, in a few words."""


def decode(encoded: bytes) -> np.ndarray:
    """uint8 (H, W, 3), or (H, W, 4) where there is transparency; of an animation the first frame.

    Turned upright as its EXIF data says; 16 bits become 8; other colour models become RGB.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            image = _of_eight_bits(ImageOps.exif_transpose(opened))
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    except Exception as error:  # Pillow raises whatever the parsers of its formats do
        reason = str(error) or type(error).__name__
        raise BadPicture(reason.splitlines()[0].partition(" <")[0]) from error  # not the name of a buffer


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits in 8; Pillow itself would cut off what is above 255."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.rint(values / 257).clip(0, 255).astype(np.uint8))
