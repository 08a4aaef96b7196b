"""Overrides ``key=value`` in Hydra's grammar. Torch-free.

Hydra's parser takes most of a second to import, and milliseconds for a text. Values that JSON and Hydra read alike are
read as JSON, plain absolute paths as they stand. What Hydra made of other texts is remembered on disk, so that a
command that is given again needs it once.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.remembered import recall, remember
from core.schema import SCHEMAS, UserError

_KEY = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")
# Numbers, constants, quoted texts, and lists of them. Backslashes, dollars and braces have a meaning of their own
_PART = r'\s*(?:-?\d[\d.eE+-]*|true|false|null|"[^"\\${}]*")\s*'
_ALIKE = re.compile(rf"{_PART}|\[(?:{_PART}(?:,{_PART})*)?\]")
_PATH = re.compile(r"/[A-Za-z0-9_./-]*[A-Za-z0-9_]")  # of a file or folder, which every new run may have another of
REMEMBERED = Path(".cache") / "composed" / "overrides.json"


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> tuple[str, Any]:
    """Key and value of an override, the value not to be written into; UserError for what is none."""
    if (read := _read_as_json(text)) is not None:
        return read
    known = _remembered()
    if text not in known:
        known[text] = _parse(text)
        remember(REMEMBERED, known)
    key, value = known[text]
    return key, value


def _read_as_json(text: str) -> tuple[str, Any] | None:
    """Key and value of ``seed=1``, ``eval.steps=[1, 2]``, ``execution.label="a b"``; None for what Hydra must read."""
    key, _, value = text.partition("=")
    if _KEY.fullmatch(key) and _PATH.fullmatch(value):
        return key, value
    if not _KEY.fullmatch(key) or not _ALIKE.fullmatch(value):
        return None
    try:
        return key, json.loads(value)
    except ValueError:
        return None


@functools.cache
def _remembered() -> dict[str, Any]:
    """Overrides by text, as this process and others before it have parsed them."""
    return recall(REMEMBERED)


def _parse(text: str) -> tuple[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise UserError(f"'{text}' is not an override; write key=value, e.g. seed=1") from None
    if override.type is None or override.type.name != "CHANGE":
        raise UserError(f"'{text}': keys are neither added nor deleted; write key=value")
    if override.is_sweep_override():
        raise UserError(f"'{text}' gives several values; one is allowed (several belong in a grid)")
    return override.key_or_group, override.value()


def split(overrides: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Choices of a group (``method=flash``) for Hydra, and values by dotted key, as ``parse`` gives them."""
    groups: list[str] = []
    values: list[tuple[str, Any]] = []
    for text in overrides:
        key, value = parse(text)
        if key in SCHEMAS:
            groups.append(text)
        else:
            values.append((key, value))
    return groups, values
