"""The task contract: what a picture is generated from, in training and at evaluation.

Text is encoded once for each different caption, by the backbone; further inputs (a mask, a low-resolution picture, a
source face) are encoded once for each item, by the task. A backbone finds both in one ``Cond``, under their own names.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from core.backbones.base import Backbone
from core.data.requests import Item, View
from core.data.shards import Example


class Task(ABC):  # noqa: B024  a task without further inputs overrides nothing
    """A task says what an example shows of itself, and how its further inputs become conditions.

    ``config`` is the task's part of the configuration; ``view`` gives an example's picture and caption.
    """

    inputs: ClassVar[tuple[str, ...]] = ()  # names of what an item has beside its caption

    def __init__(self, config: Any, view: View, image_size: int) -> None:
        self.config, self.view, self.image_size = config, view, image_size

    def item(self, example: Example, variant: int) -> Item:
        """View number ``variant`` of an example: a pure function of both."""
        image, caption = self.view(example, variant)
        return Item(image, caption, self.further_inputs(image, example, variant))

    def further_inputs(self, image: np.ndarray, example: Example, variant: int) -> dict[str, np.ndarray]:
        """The inputs of a view beside its caption: an array of any shape for each name of ``inputs``."""
        return {}

    def encode_inputs(self, backbone: Backbone, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Further inputs (B, ...) of a batch as named conditions (B, ...), beside those of the text.

        Guidance keeps them: its second pass has another text and the same inputs.
        """
        return {}

    def read_input(self, name: str, file: Path) -> np.ndarray:
        """The input ``name`` from a user's file: by default a picture, uint8 (image_size, image_size, 3)."""
        size = self.image_size, self.image_size
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))
