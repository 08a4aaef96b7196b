"""The data set of a run: its splits, and how its examples are shown. Torch-free."""

from __future__ import annotations

import logging
from functools import cache, partial
from pathlib import Path

import numpy as np

from core.config import ExperimentConfig, UserError, locate
from core.data.requests import View
from core.data.shards import Example, ImageTextDataset, open_dataset
from core.data.views import plain
from core.remembered import recall, remember
from core.splits import is_split_by_key
from experiments.emoji import views as emoji

log = logging.getLogger("fewstep")


def open_split(config: ExperimentConfig, split: str) -> ImageTextDataset:
    """One split of the run's data; the cache remembers which of its pictures cannot be decoded."""
    return open_dataset(*_opening(config, split))


def _opening(config: ExperimentConfig, split: str) -> tuple[Path, str, float, Path | None]:
    """Arguments of ``open_dataset``."""
    data, execution = config.data, config.execution
    folder, content = locate(data.path), data.data_hash
    name = content if is_split_by_key(folder) else f"{content}-{split}"
    memory = Path(execution.cache_dir) / "pictures" / f"{name}.json" if content else None
    return folder, split, execution.max_bad_examples, memory


def view_of(config: ExperimentConfig) -> View:
    """(example, variant) -> (image uint8 (image_size, image_size, 3), caption).

    How the data can be shown is found out at the first example: a session that draws given prompts never asks.
    """

    def view(example: Example, variant: int) -> tuple[np.ndarray, str]:
        return functions[shown_view(config)](example, variant)

    functions = {"plain": partial(plain, image_size=config.data.image_size), "emoji": _emoji}
    return view


def shown_view(config: ExperimentConfig) -> str:
    """The view under which all examples of the data are shown.

    An emoji's view is made from its metadata. Where no example of ``data.split`` has it, all are shown as they are.

    Raises: UserError: some examples have the metadata, and others lack it.
    """
    return _view_for(*_opening(config, config.data.split)) if config.data.view == "emoji" else config.data.view


def num_variants(config: ExperimentConfig) -> int:
    """Variants of an example that the cache holds: one where an emoji's view is asked for and the data has none."""
    return config.data.num_variants if shown_view(config) == config.data.view else 1


@cache
def _view_for(folder: Path, split: str, max_bad: float, memory: Path | None) -> str:
    """The view of a split; remembered beside ``memory``: to read all metadata takes as long as many steps."""
    remembered = None if memory is None else memory.with_name(f"{memory.stem}-{split}-{max_bad:g}-view.json")
    view = None if remembered is None else recall(remembered).get(_needed())
    if view is None:
        view = _found_view(folder, open_dataset(folder, split, max_bad, memory))
        if remembered is not None:
            remember(remembered, {_needed(): view})
    if view == "plain":
        log.info(
            "%s: no example has an emoji's metadata (%s); each is shown as it is, on white, with its own caption, "
            "as by data.view=plain data.num_variants=1",
            folder,
            _needed(),
        )
    return view


def _found_view(folder: Path, dataset: ImageTextDataset) -> str:
    lacking = [key for key, meta in zip(dataset.keys, dataset.metas, strict=True) if not _is_described(meta)]
    if 0 < len(lacking) < len(dataset):
        raise UserError(
            f"{folder}: data.view=emoji needs the metadata {_needed()}, which {len(lacking)} of {len(dataset)} "
            f"examples lack, the first {lacking[0]!r}; give data.view=plain to show all as they are"
        )
    return "plain" if lacking else "emoji"


def _needed() -> str:
    return ", ".join(sorted(emoji.METADATA))


def _is_described(meta: dict[str, object]) -> bool:
    return meta.keys() >= emoji.METADATA


def _emoji(example: Example, variant: int) -> tuple[np.ndarray, str]:
    """An emoji's view; UserError for an example of another split that is none."""
    if not _is_described(example.meta) or example.image.shape != (emoji.SIZE, emoji.SIZE, 4):
        raise UserError(
            f"data.view=emoji: {example.key!r} is no emoji: it needs {emoji.SIZE}x{emoji.SIZE} pixels, transparency "
            f"and the metadata {', '.join(sorted(emoji.METADATA))}; give data.view=plain"
        )
    return emoji.view(example, variant)
