"""The first difference of what two runs left: their ids, logs, measured values, weights, and pictures. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Never the same twice: when, how fast, and by whom
VOLATILE = {"seconds", "device_hours", "images_per_s", "time", "run"}


def first_difference(before: Path, after: Path) -> str | None:
    """The first difference of two run folders, with both values; None when there is none.

    Compared are the run's id (the folder's name), metrics.jsonl, evals.jsonl, the tensors of every snapshot, and the
    sample sheets.
    """
    if before.name != after.name:
        return f"run id: {before.name} | {after.name}"
    for name in ("metrics.jsonl", "evals.jsonl"):
        if found := _of_lines(before / name, after / name):
            return found
    for pattern in ("snapshots/**/*.safetensors", "samples/*.png"):
        if found := _of_files(before, after, pattern):
            return found
    return None


def of_json(before: Path, after: Path) -> str | None:
    """The first difference of two JSON files: the key and both values."""
    return _of_values(before.name, _flat(_json(before)), _flat(_json(after)))


def _of_lines(before: Path, after: Path) -> str | None:
    rows, others = _rows(before), _rows(after)
    for number, (row, other) in enumerate(zip(rows, others, strict=False), start=1):
        if found := _of_values(f"{before.name} row {number}", row, other):
            return found
    if len(rows) != len(others):
        return f"{before.name}: {len(rows)} rows | {len(others)} rows"
    return None


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [dict(_flat(json.loads(line))) for line in file.read_text().splitlines()]


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else {}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Every number and text of a nested value by its path, as ``evaluations.teacher``."""
    if isinstance(value, list):
        value = dict(enumerate(value, start=1))
    if not isinstance(value, dict):
        return {key: value}
    out: dict[str, Any] = {}
    for name, part in value.items():
        if name not in VOLATILE:
            out |= _flat(part, f"{key}.{name}" if key else str(name))
    return out


def _of_values(where: str, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    for key in {**before, **after}:  # a list, not a set: in the order of the file
        one, other = _shown(before, key), _shown(after, key)
        if one != other:
            return f"{where}, {key}: {one} | {other}"
    return None


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"


def _of_files(before: Path, after: Path, pattern: str) -> str | None:
    names = sorted({str(path.relative_to(root)) for root in (before, after) for path in root.glob(pattern)})
    for name in names:
        hashes, others = _hashes(before / name), _hashes(after / name)
        if found := _of_values(name, hashes, others):
            return found
    return None


def _hashes(file: Path) -> dict[str, str]:
    """Content hashes of a file by part: tensors by their names, any other file as a whole."""
    if not file.exists():
        return {}
    if file.suffix != ".safetensors":
        return {"content": _hash(file.read_bytes())}
    return dict(_tensors(file))


def _tensors(file: Path) -> Iterator[tuple[str, str]]:
    """Name and content hash, with type and shape, of each tensor of a safetensors file."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    for name in sorted(header):
        first, last = header[name]["data_offsets"]
        held = f"{header[name]['dtype']}{header[name]['shape']}"
        yield name, f"{held} {_hash(content[begin + first : begin + last])}"


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()
