"""Latents and text conditioning of a data set, computed once and memory-mapped; the training loop runs neither the
VAE nor the text encoder. Torch-free.

Items are drawn as evaluation prompts are, balanced over ``meta["kind"]``: item n is variant n of example
``draw_examples(...)[n]``, and a variant is a pure function of (example, variant).
Captions are stored once each; captions[0] is the null caption "". What a task encodes of an item's further inputs is
stored for each item. A cache is written to a temporary folder, fsynced and renamed with the hashes of its files; one
that is half-written or damaged is never opened but built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.data.requests import ItemOf, draw_examples, kinds_of, stacked
from core.data.shards import ImageTextDataset
from core.run import atomic_folder

log = logging.getLogger("fewstep")

FORMAT, SEED = 1, 0


@dataclass(frozen=True)
class LatentCache:
    """Memory-mapped arrays: ``latents`` (N, C, h, w), ``caption_index`` (N,), ``cond[name]`` (num_captions, ...).

    ``item_cond[name]`` (N, ...): conditions that belong to an item, not to its caption.
    """

    latents: np.ndarray
    caption_index: np.ndarray
    captions: list[str]
    cond: Mapping[str, np.ndarray]
    keys: list[str]
    content_hash: str
    item_cond: Mapping[str, np.ndarray] = field(default_factory=dict)


def build_cache(
    path: Path,
    dataset: ImageTextDataset,
    item_of: ItemOf,
    num_variants: int,
    encode_image: Callable[[np.ndarray], np.ndarray],
    encode_text: Callable[[list[str]], Mapping[str, np.ndarray]],
    encode_inputs: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    batch_size: int = 64,
    dtype: str = "float16",
) -> LatentCache:
    """Encode ``num_variants`` views per example (on average: kinds are balanced) and open the result.

    ``encode_image``: uint8 (B, H, W, 3) -> (B, C, h, w); ``encode_text``: prompts -> named arrays (B, ...);
    ``encode_inputs``: a task's further inputs (B, ...) -> named arrays (B, ...).
    """
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    index: dict[str, int] = {"": 0}
    drawn = draw_examples(kinds_of(dataset), len(dataset) * num_variants, SEED, "cache")
    caption_index = np.empty(len(drawn), dtype=np.int32)
    with atomic_folder(path) as folder:
        columns = _Columns(folder, len(drawn), dtype)
        for start in tqdm(range(0, len(drawn), batch_size), desc="encoding images", unit="batch", disable=None):
            rows = enumerate(drawn[start : start + batch_size], start)
            items = [item_of(dataset[int(row)], number) for number, row in rows]
            columns.put("latents", start, encode_image(np.stack([item.image for item in items])))
            for name, values in encode_inputs(stacked([item.inputs for item in items])).items():
                columns.put(f"item.{name}", start, values)
            for n, item in enumerate(items, start):
                caption_index[n] = index.setdefault(item.caption, len(index))
        columns.flush()
        np.save(folder / "caption_index.npy", caption_index)
        captions = list(index)
        chunks = [encode_text(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size)]
        for name in chunks[0]:
            np.save(folder / f"cond.{name}.npy", np.concatenate([chunk[name] for chunk in chunks]).astype(dtype))
        keys = [dataset.keys[row] for row in drawn]
        (folder / "items.json").write_text(json.dumps({"captions": captions, "keys": keys}))
        hashes = {file.name: _hash(file) for file in sorted(folder.iterdir())}
        (folder / "COMPLETE.json").write_text(json.dumps({"format": FORMAT, "files": hashes}))
    cache = open_cache(path)
    assert cache is not None, path
    return cache


def open_cache(path: Path) -> LatentCache | None:
    """The cache at ``path``; None when it is absent or damaged."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        record = json.loads((path / "COMPLETE.json").read_text())
        damaged = [name for name, expected in record["files"].items() if _hash(path / name) != expected]
        if damaged or record["format"] != FORMAT:
            raise ValueError(f"damaged files: {', '.join(damaged)}")
    except (OSError, ValueError, KeyError) as error:
        log.warning("cache %s is not whole and is built again (%s)", path, error)
        return None
    items = json.loads((path / "items.json").read_text())
    return LatentCache(
        latents=np.load(path / "latents.npy", mmap_mode="r"),
        caption_index=np.load(path / "caption_index.npy"),
        captions=items["captions"],
        cond=_named(path, "cond"),
        keys=items["keys"],
        content_hash=hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest(),
        item_cond=_named(path, "item"),
    )


def _named(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """The memory-mapped arrays ``KIND.NAME.npy`` by name."""
    return {file.name.split(".")[1]: np.load(file, mmap_mode="r") for file in sorted(folder.glob(f"{kind}.*.npy"))}


class _Columns:
    """Arrays of (num_items, ...) that are filled batch by batch, each in the file NAME.npy."""

    def __init__(self, folder: Path, num_items: int, dtype: str) -> None:
        self.folder, self.num_items, self.dtype = folder, num_items, dtype
        self.arrays: dict[str, np.memmap] = {}

    def put(self, name: str, start: int, values: np.ndarray) -> None:
        """Rows ``start`` ... of the column ``name``; its first rows fix the shape of all."""
        if name not in self.arrays:
            file, shape = self.folder / f"{name}.npy", (self.num_items, *values.shape[1:])
            self.arrays[name] = np.lib.format.open_memmap(file, mode="w+", dtype=self.dtype, shape=shape)
        self.arrays[name][start : start + len(values)] = values.astype(self.dtype)

    def flush(self) -> None:
        for array in self.arrays.values():
            array.flush()


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
