"""Evaluation prompts and the real images beside them: fixed keyed draws from a data set's split. Torch-free.

Prompts are the captions of keyed views of examples, images are other keyed views drawn in the same way: both
follow the distribution that the data set's own view function defines, so real images compared with real
images differ by chance alone. Examples that share ``meta["kind"]`` (skin tones of one emoji) count as one:
every kind occurs equally often, and so do the examples within it."""

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

View = Callable[[Example, int], tuple[np.ndarray, str]]
"""(example, variant) -> (image uint8 (H, W, 3), caption): a pure function of both."""

# Training reads the variants below data.num_variants; evaluation reads its own, and never the same twice.
PROMPT_VARIANTS, REFERENCE_VARIANTS, VARIANTS_PER_SEED = 10**6, 2 * 10**6, 10**7


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


def dataset_prompts(dataset: ImageTextDataset, view: View, count: int, seed: int = 0) -> PromptList:
    """``count`` captions of keyed views of the split ``dataset``."""
    views = _views(dataset, view, count, seed, "prompts", PROMPT_VARIANTS)
    return PromptList(tuple(caption for _, caption in views))


def reference_images(dataset: ImageTextDataset, view: View, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """``count`` real images of the split ``dataset``, from views independent of those of the prompts."""
    return (image for image, _ in _views(dataset, view, count, seed, "reference", REFERENCE_VARIANTS))


def kinds_of(dataset: ImageTextDataset) -> list[str]:
    """The kind of each example; its own key where it has none."""
    return [str(meta.get("kind", key)) for key, meta in zip(dataset.keys, dataset.metas, strict=True)]


def draw_examples(kinds: Sequence[str], count: int, seed: int, purpose: str) -> np.ndarray:
    """Indices of ``count`` examples, int64, balanced over ``kinds`` (one per example).

    All kinds in a keyed order, then all again in another; a kind's examples take turns in the same way.
    """
    members: dict[str, list[int]] = {}
    for index, kind in enumerate(kinds):
        members.setdefault(kind, []).append(index)
    names = sorted(members)
    drawn: list[int] = []
    for epoch in range(-(-count // len(names))):
        for i in permutation(seed, purpose, len(names), epoch):
            own = members[names[i]]
            cycle, turn = divmod(epoch, len(own))
            drawn.append(own[permutation(seed, f"{purpose} {names[i]}", len(own), cycle)[turn]])
    return np.array(drawn[:count], dtype=np.int64)


def _views(
    dataset: ImageTextDataset, view: View, count: int, seed: int, purpose: str, first_variant: int
) -> Iterator[tuple[np.ndarray, str]]:
    first_variant += seed * VARIANTS_PER_SEED
    for position, index in enumerate(draw_examples(kinds_of(dataset), count, seed, f"evaluation {purpose}")):
        yield view(dataset[int(index)], first_variant + position)


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
