"""Evaluation prompts and the real images beside them: fixed keyed draws from a data set's split. Torch-free.

Prompts are the captions of keyed views of examples, images are other keyed views of the same kind: both
follow the distribution that the data set's own view function defines, so real images compared with real
images differ by chance alone. Draws go through the examples in keyed permutations, so that every example
occurs equally often."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.config import UserError
from core.data.shards import Example, ImageTextDataset
from core.randomness import permutation

View = Callable[[Example, str], tuple[np.ndarray, str]]
"""(example, key) -> (image uint8 (H, W, 3), caption): a pure function, every choice drawn from ``key``."""


@dataclass(frozen=True)
class PromptList:
    """Prompts in a fixed order: position i always gets the noise of position i."""

    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def hash(self) -> str:
        """16 hex digits over the ordered prompts."""
        return hashlib.blake2b(json.dumps(self.prompts).encode(), digest_size=8).hexdigest()

    def distinct(self, count: int) -> PromptList:
        """The first ``count`` different prompts (fewer if there are fewer)."""
        return PromptList(tuple(dict.fromkeys(self.prompts))[:count])

    def repeated(self, times: int) -> PromptList:
        """Every prompt ``times`` times in a row."""
        return PromptList(tuple(prompt for prompt in self.prompts for _ in range(times)))


def plain_view(example: Example, key: str) -> tuple[np.ndarray, str]:
    """Image and caption as stored; transparency is shown on white."""
    image = example.image
    if image.shape[-1] == 4:
        alpha = image[..., 3:].astype(np.uint16)
        image = ((image[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return image, example.caption


def dataset_prompts(dataset: ImageTextDataset, view: View, count: int, seed: int = 0) -> PromptList:
    """``count`` captions of keyed views of the split ``dataset``."""
    return PromptList(tuple(caption for _, caption in _views(dataset, view, count, seed, "prompts")))


def reference_images(
    dataset: ImageTextDataset, view: View, count: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """``count`` real images of the split ``dataset``, from views independent of those of the prompts."""
    return (image for image, _ in _views(dataset, view, count, seed, "reference"))


def draw_examples(size: int, count: int, seed: int, purpose: str) -> np.ndarray:
    """Indices of ``count`` examples, int64: keyed permutations of all ``size``, one after the other."""
    num_epochs = -(-count // size)
    return np.concatenate([permutation(seed, purpose, size, epoch) for epoch in range(num_epochs)])[:count]


def _views(
    dataset: ImageTextDataset, view: View, count: int, seed: int, purpose: str
) -> Iterator[tuple[np.ndarray, str]]:
    for position, index in enumerate(draw_examples(len(dataset), count, seed, f"evaluation {purpose}")):
        yield view(dataset[int(index)], f"evaluation {purpose} {seed} {position}")


def parse_prompts(items: Sequence[str]) -> PromptList:
    """Prompts from the command line: each item is a prompt, or ``@FILE`` with one prompt a line.

    Raises:
        UserError: missing or empty file, empty prompt, no prompt at all.
    """
    prompts: list[str] = []
    for item in items:
        prompts.extend(_read_file(Path(item[1:])) if item.startswith("@") else [item.strip()])
    if not prompts or not all(prompts):
        raise UserError("no prompt given, or an empty one; give prompts or @FILE with one prompt a line")
    return PromptList(tuple(prompts))


def _read_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts file {path} cannot be read as UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts file {path} has no prompt; write one a line")
    return prompts
