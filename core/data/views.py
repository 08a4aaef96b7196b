"""The plain view of an example: the picture fitted to a square, with its own caption. Torch-free."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from core.data.shards import Example


def plain(example: Example, variant: int, image_size: int) -> tuple[np.ndarray, str]:
    """uint8 (image_size, image_size, 3): centre crop, Lanczos; transparent pictures lie on white.

    ``variant`` has no effect: there is one plain view.
    """
    image = Image.fromarray(example.image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    fitted = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(fitted), example.caption
