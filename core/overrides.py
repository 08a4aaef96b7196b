"""Overrides ``key=value``: in Hydra's grammar, and without Hydra where they are simple. Torch-free."""

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


def simple_value(text: str) -> Any:
    """A number, a quoted text, or a list of numbers and words; None for what Hydra's grammar is needed for."""
    if text.startswith("[") and text.endswith("]"):
        return _simple_list(text[1:-1])
    return _simple_scalar(text)


def _simple_scalar(text: str) -> int | float | str | None:
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    quoted = _QUOTED.fullmatch(text)
    return quoted[1] if quoted else None


def _simple_list(text: str) -> list[int | float | str] | None:
    values = []
    for part in text.split(","):
        item = part.strip(" ")
        is_word = _WORD.fullmatch(item) and item.lower() not in _NO_WORDS
        value = item if is_word else _simple_scalar(item)
        if value is None:
            return None
        values.append(value)
    return values


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> tuple[str, Any]:
    """Key and value of an override in Hydra's grammar, whose parser needs a millisecond; UserError for any other."""
    found = _KEY.fullmatch(text)
    value = simple_value(found["value"]) if found else None
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
    """``value``, or a copy of it where it could be changed: parsed values are remembered."""
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def fitting(value: Any, current: Any) -> Any:
    """``value`` if OmegaConf would surely store it in place of ``current``, integers as floats; otherwise None."""
    if isinstance(value, list):
        return _fitting_list(value, current)
    if type(value) is not type(current) or type(value) not in (int, float, str):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fitting_list(values: list[Any], current: Any) -> list[Any] | None:
    """Numbers in place of floats, or a list of one type in place of another of that type."""
    given = set(map(type, values))
    held = set(map(type, current)) if isinstance(current, list) else set()
    if held == {float} and given in ({int}, {float}, {int, float}):
        return _finite_floats(values)
    if given == held and held in ({int}, {str}):
        return list(values)
    return None


def _finite_floats(values: list[int | float]) -> list[float] | None:
    return list(map(float, values)) if all(map(math.isfinite, values)) else None
