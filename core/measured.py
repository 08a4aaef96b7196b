"""The numbers of a run: lines of evals.jsonl, read so that tables of a thousand runs do not wait for them. Torch-free.

A line holds half a page of protocol, and a few protocols stand in thousands of lines: each is read once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from core.schema import UserError

KEY = ("metric", "split", "steps", "weights", "images", "protocol")  # of two numbers that agree in it the newer counts


class Number(msgspec.Struct):
    """One measured value; ``images`` were seen by the student, ``time`` is ISO 8601."""

    metric: str
    split: str
    steps: int
    weights: str
    images: int
    protocol: str
    value: float
    n: int
    nfe: int | float | None = None
    guidance: int | float | None = None
    time: str = ""
    protocol_fields: msgspec.Raw = msgspec.Raw(b"{}")  # as they are in the file: see ``protocol_fields``


_DECODER = msgspec.json.Decoder(Number)


def read_numbers(file: Path) -> list[Number]:
    """The numbers of a file, of those with one KEY the newest; none without a file, and none of a torn line.

    Raises UserError for a line that is JSON, and no number.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    try:
        found = _DECODER.decode_lines(content)
    except msgspec.DecodeError:
        found = [number for line in content.splitlines() if (number := _number(line, file)) is not None]
    by_key = {(n.metric, n.split, n.steps, n.weights, n.images, n.protocol): n for n in found}
    return list(by_key.values())


def newest(numbers: Iterable[Number]) -> list[Number]:
    """The numbers of the run's longest training."""
    numbers = list(numbers)
    end = max((number.images for number in numbers), default=0)
    return [number for number in numbers if number.images == end]


def _number(line: bytes, file: Path) -> Number | None:
    """The number of a line, whose value may be NaN, which is no JSON; None of a torn one."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    try:
        raw = msgspec.Raw(msgspec.json.encode(values.pop("protocol_fields", {})))
        return msgspec.convert(values | {"protocol_fields": raw}, Number)
    except (AttributeError, msgspec.ValidationError) as error:
        raise UserError(f"{file}: a line is no number ({error}): {line[:80].decode(errors='replace')}") from None


@functools.lru_cache(maxsize=4096)
def protocol_fields(written: bytes) -> dict[str, Any]:
    """``bytes(Number.protocol_fields)`` as a mapping that is not to be written into."""
    return msgspec.json.decode(written)
