"""Image and caption data: webdataset-style tar shards, or a folder of images with captions.

A shard folder holds ``<split>-00000.tar`` (or ``.tar.gz``), ... whose members share a stem per example: ``<key>.png``
(any format Pillow reads), ``<key>.txt`` (UTF-8 caption) and optionally ``<key>.json`` (free metadata).
``SHA256SUMS`` in that folder, when present, is verified before anything is read. An image folder holds
images with ``<name>.txt`` beside each, or one ``metadata.jsonl`` / ``captions.csv`` with the columns
``file_name`` and ``caption`` (``text`` is accepted too, as in Hugging Face image folders).

Examples that cannot be used are left out and told; more than a share of them is a user's mistake. This module imports
no torch. Images are uint8 arrays (H, W, 3) or, where the file has transparency, (H, W, 4).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.config import UserError
from core.data.pictures import BadPicture, decode
from core.data.sources import BadExample, RawExample, read_image_folder, read_shard
from core.remembered import recall, remember
from core.splits import HELD_OUT, check_split, held_out, is_split_by_key, shards, shards_by_name

__all__ = [
    "Example", "ImageTextDataset", "RawExample", "open_dataset", "write_checksums", "write_shards",
]  # fmt: skip

log = logging.getLogger("fewstep")

CHECKSUMS = "SHA256SUMS"
MAX_BAD = 0.01  # share of examples that may be unusable
NUM_NAMED = 3  # of the bad ones
CHECK = 1  # raised when more or fewer pictures can be decoded


@dataclass(frozen=True)
class Example:
    """One decoded pair: ``image`` is uint8 (H, W, 3) or (H, W, 4)."""

    key: str
    image: np.ndarray
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


class ImageTextDataset:
    """Random access to examples held in memory as encoded bytes, sorted by key."""

    def __init__(self, raw: Iterable[RawExample]) -> None:
        self._raw = sorted(raw, key=lambda r: r.key)

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> Example:
        raw = self._raw[index]
        return Example(raw.key, decode(raw.image), raw.caption, raw.meta)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def keys(self) -> list[str]:
        return [raw.key for raw in self._raw]

    @property
    def captions(self) -> list[str]:
        return [raw.caption for raw in self._raw]

    @property
    def metas(self) -> list[dict[str, Any]]:
        return [raw.meta for raw in self._raw]

    @property
    def content_hash(self) -> str:
        """sha256 over the sorted digests of the examples: the identity of the data."""
        digests = sorted(raw.digest() for raw in self._raw)
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def open_dataset(
    path: str | Path, split: str = "train", max_bad: float = MAX_BAD, memory: Path | None = None
) -> ImageTextDataset:
    """Open one split of a folder of tar shards or of images with captions (core/splits.py says which it has).

    Bad examples are left out and named in the log. ``memory``: a file that remembers which pictures cannot be decoded.

    Raises:
        UserError: missing folder or split, no data in it, wrong checksum, corrupt shard, two examples with one key,
            or a share of bad examples above ``max_bad``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist")
    check_split(folder, split)
    good, bad = _told_apart(_read(folder, split))
    _check_keys(good)
    good, undecodable = _decodable(good, memory)
    _check_bad(folder, [*bad, *undecodable], len(good), max_bad)
    if is_split_by_key(folder):
        good = _of_split(folder, good, split)
    return ImageTextDataset(good)


def _read(folder: Path, split: str) -> Iterator[RawExample | BadExample]:
    """All examples of a folder of images, or of the shards that hold a split."""
    named = shards_by_name(folder)
    if not named:
        yield from read_image_folder(folder)
        return
    chosen = named.get(split) or shards(folder)  # one name alone is split by key
    _verify_checksums(folder, chosen)
    for shard in chosen:
        yield from read_shard(shard)


def _told_apart(read: Iterable[RawExample | BadExample]) -> tuple[list[RawExample], list[BadExample]]:
    good, bad = [], []
    for example in read:
        (bad if isinstance(example, BadExample) else good).append(example)
    return good, bad


def _check_keys(raw: Sequence[RawExample]) -> None:
    seen: set[str] = set()
    for item in raw:
        if item.key in seen:
            raise UserError(f"{item.source}: the key {item.key!r} occurs twice")
        seen.add(item.key)


def _decodable(raw: Sequence[RawExample], memory: Path | None) -> tuple[list[RawExample], list[BadExample]]:
    """The examples whose pictures can be decoded, and the others; found out once if there is a ``memory``."""
    known = recall(memory) if memory is not None else {}
    if known.get("check") != CHECK:
        known = {"check": CHECK, "undecodable": _undecodable(raw)}
        if memory is not None:
            remember(memory, known)
    good, bad = [], []
    for item in raw:
        reason = known["undecodable"].get(item.key)
        if reason is None:
            good.append(item)
        else:
            bad.append(BadExample(f"{item.source}: the image of {item.key!r} cannot be read ({reason})"))
    return good, bad


def _undecodable(raw: Sequence[RawExample]) -> dict[str, str]:
    """Why pictures cannot be decoded, by the keys of those that cannot."""
    found = {}
    with ThreadPoolExecutor() as pool:
        reasons = tqdm(pool.map(_reason, raw), "checking pictures", len(raw), disable=None, delay=2)
        for item, reason in zip(raw, reasons, strict=True):
            if reason:
                found[item.key] = reason
    return found


def _reason(raw: RawExample) -> str:
    """Why the picture cannot be decoded; empty if it can."""
    try:
        decode(raw.image)
    except BadPicture as error:
        return str(error)
    return ""


def _check_bad(folder: Path, bad: Sequence[BadExample], num_good: int, max_bad: float) -> None:
    """UserError for too many bad examples, a warning for a few."""
    if not bad:
        return
    total = len(bad) + num_good
    found = f"{len(bad)} of {total} examples cannot be used"
    named = "; ".join([example.reason for example in bad[:NUM_NAMED]] + ["..."] * (len(bad) > NUM_NAMED))
    if not num_good or len(bad) > max_bad * total:
        raise UserError(f"{folder}: {found}, execution.max_bad_examples={max_bad:g} is the largest share: {named}")
    _tell_once(logging.WARNING, f"{folder}: {found} and are left out: {named}")


@cache
def _tell_once(level: int, text: str) -> None:
    """Log a line about a data set once, however often its splits are opened."""
    log.log(level, text)


def _of_split(folder: Path, raw: Sequence[RawExample], split: str) -> list[RawExample]:
    """The part of a data set that is split by its keys."""
    out = held_out([item.key for item in raw])
    _tell_once(
        logging.INFO,
        f"{folder}: {len(out)} of {len(raw)} examples are held out, by their keys (splits {' and '.join(HELD_OUT)})",
    )
    is_wanted = split in HELD_OUT
    if is_wanted and not out:
        raise UserError(f"{folder} has a single example, of which none is held out; give two or more")
    return [item for item in raw if (item.key in out) == is_wanted]


def write_shards(folder: Path, split: str, items: Iterable[RawExample], examples_per_shard: int = 2000) -> None:
    """Write deterministic gzipped tar shards (no times, no owners): the same examples give the same bytes.

    The compression is for tar's padding, which would double the size of small images.
    """
    ordered = sorted(items, key=lambda r: r.key)
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(ordered), examples_per_shard)):
        path = folder / f"{split}-{number:05d}.tar.gz"
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for raw in ordered[start : start + examples_per_shard]:
                meta = json.dumps(raw.meta, sort_keys=True, ensure_ascii=False)
                _add(tar, f"{raw.key}.png", raw.image)
                _add(tar, f"{raw.key}.txt", raw.caption.encode())
                _add(tar, f"{raw.key}.json", meta.encode())


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS`` for all shards, in the format of ``sha256sum -c``."""
    lines = [f"{_sha256(tar)}  {tar.name}\n" for tar in shards(folder)]
    (folder / CHECKSUMS).write_text("".join(lines))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _verify_checksums(folder: Path, chosen: Sequence[Path]) -> None:
    if not (folder / CHECKSUMS).exists():
        return
    listed = dict(reversed(line.split(maxsplit=1)) for line in (folder / CHECKSUMS).read_text().splitlines())
    for shard in chosen:
        if listed.get(shard.name) != _sha256(shard):
            raise UserError(f"{shard} is corrupt: its sha256 is not the one listed in {CHECKSUMS}")
