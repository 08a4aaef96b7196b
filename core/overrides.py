"""Overrides ``key=value`` in Hydra's grammar. Torch-free.

Hydra's parser takes most of a second to import. What it made of a text is remembered on disk, so that a command that
is given again, or the cells of a grid, need it once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.remembered import recall, remember
from core.schema import SCHEMAS, UserError

REMEMBERED = Path(".cache") / "composed" / "overrides.json"


def parse(text: str) -> tuple[str, Any]:
    """Key and value of an override; UserError for what is none."""
    known = _remembered()
    if text not in known:
        known[text] = _parse(text)
        remember(REMEMBERED, known)
    key, value = known[text]
    return key, value


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
    """Choices of a group (``method=flash``) for Hydra, and values by dotted key."""
    groups: list[str] = []
    values: list[tuple[str, Any]] = []
    for text in overrides:
        key, value = parse(text)
        if key in SCHEMAS:
            groups.append(text)
        else:
            values.append((key, copy.deepcopy(value)))  # parsed values are remembered
    return groups, values
