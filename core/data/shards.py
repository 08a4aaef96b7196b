"""Image and caption data: webdataset-style tar shards, or a folder of images with captions.

A shard folder holds ``<split>-00000.tar`` (or ``.tar.gz``), ... whose members share a stem per example: ``<key>.png``
(any format Pillow reads), ``<key>.txt`` (UTF-8 caption) and optionally ``<key>.json`` (free metadata).
``SHA256SUMS`` in that folder, when present, is verified before anything is read. An image folder holds
images with ``<name>.txt`` beside each, or one ``metadata.jsonl`` / ``captions.csv`` with the columns
``file_name`` and ``caption`` (``text`` is accepted too, as in Hugging Face image folders).

This module imports no torch. Images are uint8 arrays (H, W, 3) or, where the file has transparency,
(H, W, 4).
"""

import csv
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.config import UserError

CHECKSUMS = "SHA256SUMS"
SHARD_PATTERNS = ("*.tar", "*.tar.gz", "*.tgz")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Example:
    """One decoded pair: ``image`` is uint8 (H, W, 3) or (H, W, 4)."""

    key: str
    image: np.ndarray
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RawExample:
    """One undecoded pair; ``source`` names the file it came from in error messages."""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any]
    source: str

    def digest(self) -> str:
        """sha256 of key, image bytes, caption and metadata, independent of packaging."""
        text = json.dumps([self.key, self.caption, self.meta], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode() + b"\0" + self.image).hexdigest()


class ImageTextDataset:
    """Random access to examples held in memory as encoded bytes, sorted by key."""

    def __init__(self, raw: Iterable[RawExample]) -> None:
        self._raw = sorted(raw, key=lambda r: r.key)

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> Example:
        raw = self._raw[index]
        return Example(raw.key, _decode(raw), raw.caption, raw.meta)

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


def open_dataset(path: str | Path, split: str = "train") -> ImageTextDataset:
    """Open a folder of tar shards (``split`` selects ``<split>-*.tar[.gz]``) or an image folder with captions.

    Raises:
        UserError: missing folder, no data in it, wrong checksum, corrupt shard, image without caption,
            two examples with one key.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist")
    raw = list(_read_shards(folder, split) if _shards(folder) else _read_image_folder(folder))
    seen: set[str] = set()
    for item in raw:
        if item.key in seen:
            raise UserError(f"{item.source}: the key {item.key!r} occurs twice")
        seen.add(item.key)
    return ImageTextDataset(raw)


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
    lines = [f"{_sha256(tar)}  {tar.name}\n" for tar in _shards(folder)]
    (folder / CHECKSUMS).write_text("".join(lines))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _shards(folder: Path, prefix: str = "") -> list[Path]:
    return sorted(path for pattern in SHARD_PATTERNS for path in folder.glob(prefix + pattern))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_shards(folder: Path, split: str) -> Iterator[RawExample]:
    shards = _shards(folder, f"{split}-")
    if not shards:
        found = sorted({tar.name.rsplit("-", 1)[0] for tar in _shards(folder)})
        raise UserError(f"{folder} has no split {split!r}; it has: {', '.join(found)}")
    _verify_checksums(folder, shards)
    for shard in shards:
        yield from _read_shard(shard)


def _verify_checksums(folder: Path, shards: list[Path]) -> None:
    if not (folder / CHECKSUMS).exists():
        return
    listed = dict(reversed(line.split(maxsplit=1)) for line in (folder / CHECKSUMS).read_text().splitlines())
    for shard in shards:
        if listed.get(shard.name) != _sha256(shard):
            raise UserError(f"{shard} is corrupt: its sha256 is not the one listed in {CHECKSUMS}")


def _read_shard(shard: Path) -> Iterator[RawExample]:
    members: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.isfile():
                    stem, _, suffix = member.name.partition(".")
                    members.setdefault(stem, {})["." + suffix.lower()] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard} is corrupt: {error}") from error
    for stem, parts in members.items():
        image = next((parts[s] for s in IMAGE_SUFFIXES if s in parts), None)
        if image is None:
            raise UserError(f"{shard}: {stem!r} has no image ({', '.join(IMAGE_SUFFIXES)})")
        if ".txt" not in parts:
            raise UserError(f"{shard}: image {stem!r} has no caption ({stem}.txt)")
        meta = json.loads(parts.get(".json", b"{}"))
        yield RawExample(stem, image, parts[".txt"].decode().strip(), meta, str(shard))


def _read_image_folder(folder: Path) -> Iterator[RawExample]:
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"{folder} has neither tar shards nor images ({', '.join(IMAGE_SUFFIXES)})")
    table = _caption_table(folder)
    for path in images:
        beside = path.with_suffix(".txt")
        if path.name in table:
            caption, meta = table[path.name]
        elif beside.exists():
            caption, meta = beside.read_text().strip(), {}
        else:
            raise UserError(f"image {path} has no caption ({beside.name}, metadata.jsonl or captions.csv)")
        yield RawExample(path.stem, path.read_bytes(), caption, meta, str(path))


def _caption_table(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Captions and further columns by file name, from metadata.jsonl or captions.csv if there is one."""
    jsonl, table = folder / "metadata.jsonl", folder / "captions.csv"
    if jsonl.exists():
        source, rows = jsonl, [json.loads(line) for line in jsonl.read_text().splitlines() if line.strip()]
    elif table.exists():
        with table.open(newline="") as file:
            source, rows = table, list(csv.DictReader(file))
    else:
        return {}
    captions = {}
    for number, row in enumerate(rows, start=1):
        caption = row.pop("caption", None) or row.pop("text", None)
        name = row.pop("file_name", None)
        if not name or not caption:
            raise UserError(f"{source}, entry {number}: needs the columns file_name and caption")
        captions[name] = (caption, row)
    return captions


def _decode(raw: RawExample) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(raw.image))
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{raw.source}: the image of {raw.key!r} cannot be read") from error
