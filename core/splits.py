"""The splits of a folder of data: by the names of its shards, or by the keys of its examples. Torch-free.

Shards are named after their split: ``train-00000.tar``, ``heldout-00000.tar``. A folder in which nothing is held out
(pictures, or shards of one name that says nothing of it) is split by its examples' keys: a fixed share of them is
held out, whatever else is in the folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from core.schema import UserError

TRAIN = "train"
HELD_OUT = ("heldout", "val")  # both are the part that is held out by key
HELD_OUT_SHARE = 0.1
HELD_OUT_SHARDS = {*HELD_OUT, "validation", "test"}  # names of shards that are no training data
CAPTIONS = {TRAIN: "training captions", "heldout": "held-out captions", "val": "COCO validation captions"}
SHARD_PATTERNS = ("*.tar", "*.tar.gz", "*.tgz")


def captions(split: str) -> str:
    """The captions of a split in the words of tables and figures: ``held-out captions``."""
    return CAPTIONS.get(split, f"captions of {split}")


def shards(folder: Path) -> list[Path]:
    """All tar shards of a folder, sorted by name."""
    return sorted(path for pattern in SHARD_PATTERNS for path in folder.glob(pattern))


def shards_by_name(folder: Path) -> dict[str, list[Path]]:
    """Shards by what precedes the last hyphen of their names; ``train`` where there is none (``00000.tar``)."""
    found: dict[str, list[Path]] = {}
    for shard in shards(folder):
        name, hyphen, _ = shard.name.rpartition("-")
        found.setdefault(name if hyphen else TRAIN, []).append(shard)
    return dict(sorted(found.items()))


def is_split_by_key(folder: Path) -> bool:
    """Whether nothing in the folder is held out by name; False for a folder that does not exist."""
    names = [*shards_by_name(folder)]
    return folder.is_dir() and len(names) < 2 and not HELD_OUT_SHARDS.intersection(names)


def splits_of(folder: Path) -> list[str]:
    """The names of all splits."""
    return [TRAIN, *HELD_OUT] if is_split_by_key(folder) else [*shards_by_name(folder)]


def check_split(folder: Path, split: str) -> None:
    """Raise UserError unless the folder has this split."""
    known = splits_of(folder)
    if split not in known:
        raise UserError(f"{folder} has no split {split!r}; it has: {', '.join(known)}")


def held_out(keys: Collection[str]) -> set[str]:
    """The keys that are held out: a share of about HELD_OUT_SHARE, at least one of two or more."""
    if len(keys) < 2:
        return set()
    places = {key: _place(key) for key in keys}
    return {key for key, place in places.items() if place < HELD_OUT_SHARE} or {min(places, key=places.__getitem__)}


def _place(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, so that further examples move none to another split."""
    digest = hashlib.blake2b(f"held out {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
