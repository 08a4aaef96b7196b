"""Overrides ``key=value``: in Hydra's grammar, and without Hydra where they are plain. Torch-free."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

from core.schema import SCHEMAS, UserError

_KEY = re.compile(r"(?P<key>[a-z_][a-z0-9_.]*)=(?P<value>.*)", re.DOTALL)
_INT = re.compile(r"-?(?:0|[1-9]\d{0,14})")
_FLOAT = re.compile(r"-?\d+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)")
_QUOTED = re.compile(r'"([^"\\$]*)"')
_WORD = re.compile(r"[a-zA-Z_]\w*")
_NO_WORDS = ("true", "false", "null", "nan", "inf")


def plain_value(text: str) -> Any:
    """A number, a quoted text, or a list of numbers and words; None for what Hydra's grammar is needed for."""
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if quoted := _QUOTED.fullmatch(text):
        return quoted[1]
    if not (text.startswith("[") and text.endswith("]")):
        return None
    parts = [part.strip(" ") for part in text[1:-1].split(",")]
    values = [part if _WORD.fullmatch(part) and part.lower() not in _NO_WORDS else plain_value(part) for part in parts]
    return values if all(type(value) in (int, float, str) for value in values) else None


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> tuple[str, Any]:
    """Key and value of an override in Hydra's grammar, whose parser needs a millisecond; UserError for any other."""
    found = _KEY.fullmatch(text)
    value = plain_value(found["value"]) if found else None
    if value is not None:
        return found["key"], value
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
            values.append((key, own(value)))
    return groups, values


def own(value: Any) -> Any:
    """A copy of what is remembered, where it can be changed."""
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def plain(value: Any, current: Any) -> Any:
    """``value`` where OmegaConf would take it as it is in place of ``current``, or as floats; otherwise None."""
    if isinstance(value, list) and isinstance(current, list) and value and current:
        given, held = {type(x) for x in value}, {type(x) for x in current}
        if held == {float} and given <= {int, float}:
            return [float(x) for x in value] if all(math.isfinite(x) for x in value) else None
        return list(value) if given == held and held < {int, str} else None
    if type(value) is not type(current):
        return None
    if type(value) is float:
        return value if math.isfinite(value) else None
    return value if type(value) in (int, str) else None
