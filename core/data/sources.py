"""The files of a data set, read example by example; one that cannot be used says why. Torch-free."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from core.data.pictures import IMAGE_SUFFIXES
from core.schema import UserError


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


@dataclass(frozen=True)
class BadExample:
    """An example that cannot be used; ``reason`` names its file and says why."""

    reason: str


class Unusable(ValueError):
    """The reason why a part of an example cannot be used."""


def read_shard(shard: Path) -> Iterator[RawExample | BadExample]:
    """The examples of a tar file; UserError when the file itself is damaged."""
    for stem, parts in _members(shard).items():
        try:
            yield _of_parts(stem, parts, shard)
        except Unusable as error:
            yield BadExample(f"{shard}: {error}")


def _members(shard: Path) -> dict[str, dict[str, bytes]]:
    """The files of a tar by what they share, folders included, and by suffix; without hidden ones."""
    members: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isfile() and not path.name.startswith("."):
                    stem, _, suffix = path.name.partition(".")
                    key = str(path.with_name(stem))  # "./a.png" and "a.png" are the same
                    members.setdefault(key, {})["." + suffix.lower()] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard} is corrupt: {error}") from error
    return members


def _of_parts(stem: str, parts: Mapping[str, bytes], shard: Path) -> RawExample:
    image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    if image is None:
        raise Unusable(f"{stem!r} has no image ({', '.join(IMAGE_SUFFIXES)})")
    if ".txt" not in parts:
        raise Unusable(f"image {stem!r} has no caption ({stem}.txt)")
    caption = _caption(parts[".txt"], f"{stem}.txt")
    return RawExample(stem, image, caption, _object(parts.get(".json", b"{}"), f"{stem}.json"), str(shard))


def _caption(text: bytes, name: str) -> str:
    try:
        caption = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise Unusable(f"the caption {name} is not UTF-8 text") from None
    if not caption:
        raise Unusable(f"the caption {name} is empty")
    return caption


def _object(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object in ``text``."""
    try:
        values = json.loads(text)
    except ValueError:  # also of bytes that are not UTF-8
        raise Unusable(f"{name} is not JSON") from None
    if not isinstance(values, dict):
        raise Unusable(f"{name} is not a JSON object")
    return values


@dataclass
class CaptionTable:
    """Captions and further columns by the picture's path in the folder; ``broken`` names lines that are none."""

    rows: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def read_image_folder(folder: Path) -> Iterator[RawExample | BadExample]:
    """The pictures below a folder, keyed by their paths in it; UserError when there is none."""
    pictures = _pictures(folder)
    if not pictures:
        raise UserError(f"{folder} has neither tar shards nor images ({', '.join(IMAGE_SUFFIXES)})")
    table = _caption_table(folder)
    for name, path in pictures.items():
        try:
            caption, meta = table.rows.get(name) or (_caption_beside(path, table), {})
            yield RawExample(str(PurePosixPath(name).with_suffix("")), path.read_bytes(), caption, meta, str(path))
        except (Unusable, OSError) as error:
            yield BadExample(f"image {path} {error}")
    for name in sorted(table.rows.keys() - pictures.keys()):
        yield BadExample(f"{folder}: no image {name}, which the table of captions names")


def _pictures(folder: Path) -> dict[str, Path]:
    """Pictures below a folder by their paths in it, without hidden files and folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = path
    return found


def _caption_beside(path: Path, table: CaptionTable) -> str:
    beside = path.with_suffix(".txt")
    if not beside.exists():
        broken = f"; {table.broken[0]}" if table.broken else ""
        raise Unusable(f"has no caption ({beside.name}, metadata.jsonl or captions.csv){broken}")
    try:
        return _caption(beside.read_bytes(), beside.name)
    except Unusable as error:
        raise Unusable(f"cannot be used: {error}") from None


def _caption_table(folder: Path) -> CaptionTable:
    """The captions of metadata.jsonl or captions.csv, if there is one; broken lines are left out."""
    table = CaptionTable()
    for name, read in {"metadata.jsonl": _json_rows, "captions.csv": _csv_rows}.items():
        file = folder / name
        if not file.exists():
            continue
        for number, row in enumerate(read(file), start=1):
            try:
                _enter(table, row)
            except Unusable as error:
                table.broken.append(f"{file}, entry {number}: {error}")
        return table
    return table


def _json_rows(file: Path) -> Iterator[dict[str, Any] | Unusable]:
    for line in filter(bytes.strip, file.read_bytes().split(b"\n")):
        try:
            yield _object(line, "it")
        except Unusable as error:
            yield error


def _csv_rows(file: Path) -> Iterator[dict[str, Any] | Unusable]:
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            yield Unusable("it has more fields than the table has columns") if None in row else row
    except csv.Error as error:
        raise UserError(f"{file}: {error}") from None


def _enter(table: CaptionTable, row: dict[str, Any] | Unusable) -> None:
    if isinstance(row, Unusable):
        raise row
    caption = row.pop("caption", None) or row.pop("text", None)
    name = row.pop("file_name", None)
    if not (isinstance(name, str) and name and isinstance(caption, str) and caption.strip()):
        raise Unusable("needs the columns file_name and caption")
    if _has_surrogates(name + caption):
        raise Unusable("not UTF-8 text")
    table.rows[PurePosixPath(name).as_posix()] = (caption, row)


def _has_surrogates(text: str) -> bool:
    """Whether the text was read from bytes that are not UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
