"""Items to learn from, requests at evaluation, and the real images beside them. Torch-free.

An item is one keyed view of an example: its picture, its caption, and the task's further inputs by name. Requests are
captions and further inputs of keyed views, real images are other keyed views drawn in the same way: both follow the
distribution that the data set's own view function defines, so real images compared with real images differ by chance
alone. Examples that share ``meta["kind"]`` (skin tones of one emoji) count as one: every kind occurs equally often, and
so do the examples within it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from core.data.shards import Example, ImageTextDataset
from core.randomness import permutation

View = Callable[[Example, int], tuple[np.ndarray, str]]
"""(example, variant) -> (image uint8 (H, W, 3), caption): a pure function of both."""

# Training reads the variants below data.num_variants; evaluation reads its own, and never the same twice.
PROMPT_VARIANTS, REFERENCE_VARIANTS, VARIANTS_PER_SEED = 10**6, 2 * 10**6, 10**7


@dataclass(frozen=True)
class Item:
    """A view of an example: the picture to generate, uint8 (H, W, 3), and what it is generated from."""

    image: np.ndarray
    caption: str
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


ItemOf = Callable[[Example, int], Item]
"""(example, variant) -> item: a pure function of both."""


@dataclass(frozen=True)
class Requests:
    """Pictures to generate, in a fixed order: request i always gets the noise of position i.

    ``inputs``: the task's further inputs by name, each (N, ...), one row for each of the N texts.
    """

    texts: tuple[str, ...]
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rows in self.inputs.items():
            assert len(rows) == len(self.texts), (name, len(rows), len(self.texts))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> Requests:
        return Requests(self.texts[rows], {name: values[rows] for name, values in self.inputs.items()})

    @property
    def hash(self) -> str:
        """16 hex digits over the ordered texts and all further inputs."""
        digest = hashlib.blake2b(json.dumps(self.texts).encode(), digest_size=8)
        for name, values in sorted(self.inputs.items()):
            digest.update(f"{name} {values.dtype} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def distinct(self, count: int) -> Requests:
        """The first requests of the first ``count`` different texts (fewer if there are fewer)."""
        first = {text: row for row, text in reversed([*enumerate(self.texts)])}
        return self._taken(sorted(first.values())[:count])

    def repeated(self, times: int) -> Requests:
        """Every request ``times`` times in a row."""
        return self._taken(np.repeat(np.arange(len(self)), times).tolist())

    def _taken(self, rows: Sequence[int]) -> Requests:
        inputs = {name: values[list(rows)] for name, values in self.inputs.items()}
        return Requests(tuple(self.texts[row] for row in rows), inputs)


def dataset_requests(dataset: ImageTextDataset, item_of: ItemOf, count: int, seed: int = 0) -> Requests:
    """``count`` captions and further inputs of keyed views of the split ``dataset``."""
    texts, inputs = [], []
    for item in _items(dataset, item_of, count, seed, "prompts", PROMPT_VARIANTS):
        texts.append(item.caption)
        inputs.append(item.inputs)
    return Requests(tuple(texts), stacked(inputs))


def stacked(inputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The further inputs of several items, each name as one array (N, ...)."""
    names = inputs[0] if inputs else ()
    return {name: np.stack([of_one[name] for of_one in inputs]) for name in names}


def reference_images(dataset: ImageTextDataset, item_of: ItemOf, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """``count`` real images of the split ``dataset``, from views independent of those of the requests."""
    return (item.image for item in _items(dataset, item_of, count, seed, "reference", REFERENCE_VARIANTS))


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


def _items(
    dataset: ImageTextDataset, item_of: ItemOf, count: int, seed: int, purpose: str, first_variant: int
) -> Iterator[Item]:
    first_variant += seed * VARIANTS_PER_SEED
    for position, index in enumerate(draw_examples(kinds_of(dataset), count, seed, f"evaluation {purpose}")):
        yield item_of(dataset[int(index)], first_variant + position)
