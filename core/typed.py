"""Plain values, of YAML or of a command line, as dataclasses: one check of types for all that users write. Torch-free.

msgspec types the values by the dataclasses' annotations: whole numbers become floats where floats are wanted, texts
become the numbers that they spell. What it does not do is done here: unknown keys and missing values are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from core.schema import MISSING, UserError, nearest

T = TypeVar("T")


TEXTS = (str, str | None)
# msgspec's words for what YAML calls otherwise
WORDS = {"array": "list", "object": "mapping"}


class MissingValue(UserError):
    """A mandatory key that nobody has given a value."""


def load_yaml(text: str, noun: str) -> dict[str, Any]:
    """The mapping that a YAML text holds; UserError, one line, for anything else. ``noun``: what it should be."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"not {noun} (a mapping is expected)")
    return OmegaConf.to_container(tree)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML that ``load_yaml`` reads as the same values."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(values))


def read_yaml(path: Path, schema: type[T], noun: str) -> T:
    """A YAML file typed by a dataclass; UserError, one line that names the key, for what does not fit."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(" ".join(str(error).split())) from None
    return typed(schema, load_yaml(text, noun))


def typed(schema: type[T], values: Mapping[str, Any], parts: Mapping[str, type] | None = None) -> T:
    """``values`` as the dataclass ``schema``; ``parts``: schemas of fields, instead of those that it declares.

    Raises:
        UserError: a key that is unknown, a mandatory one without a value, or a value of another type; it names the key.
    """
    own = {name: _typed(part, values[name], f"{name}.") for name, part in (parts or {}).items()}
    rest = {name: value for name, value in values.items() if name not in own}
    result = _typed(schema, rest, "", given=own)
    for name, part in own.items():
        setattr(result, name, part)
    return result


def _typed(schema: type[T], values: Any, prefix: str, given: Collection[str] = ()) -> T:
    """``values`` as ``schema``; ``given``: fields that lie elsewhere and are not missing."""
    prepared = _prepared(schema, values, prefix, given)
    try:
        return msgspec.convert(prepared, schema, strict=False)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        key = (prefix + place.strip("`.").replace("[...]", "")).strip(".")
        words = [WORDS.get(word, word) for word in re.split(r"\b", reason.replace("`", ""))]
        hint = "; YAML reads on, off, yes and no as such" if reason.endswith("got `bool`") else ""
        raise UserError(f"{key}{_given(prepared, place)}: {''.join(words)}{hint}") from None


def _given(values: Any, place: str) -> str:
    """``=VALUE`` for what lies at a place of msgspec's error, or nothing where it cannot be told."""
    for name in re.findall(r"\w+", place):
        try:
            values = values[int(name) if isinstance(values, list) else name]
        except (KeyError, IndexError, ValueError, TypeError):
            return ""
    return f"={values}"


def _prepared(schema: type, values: Any, prefix: str, given: Collection[str] = ()) -> Any:
    """``values`` with all keys known, all mandatory ones given, and numbers written out where a text is wanted."""
    if not isinstance(values, Mapping):
        return values
    known = _fields(schema)
    for name in values:
        if name not in known:
            raise UserError(f"unknown key '{prefix}{name}'{nearest(str(name), known)}")
    out = {}
    for name, (kind, default) in known.items():
        if name in given:
            continue
        value = values.get(name, default)
        if isinstance(value, str) and value == MISSING:
            raise MissingValue(f"{prefix}{name} has no value; give {prefix}{name}=VALUE")
        if name in values:
            out[name] = _prepared_value(kind, value, f"{prefix}{name}")
    return out


def _prepared_value(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _prepared(kind, value, f"{key}.")
    if isinstance(value, list | Mapping):
        return _prepared_parts(typing.get_args(kind), value, key)
    return _text_where_wanted(kind, value)


def _prepared_parts(kinds: tuple[Any, ...], values: list[Any] | Mapping[str, Any], key: str) -> Any:
    """The parts of a list or a mapping, of the last of ``kinds``; of an untyped one as they are."""
    if not kinds:
        return values
    if isinstance(values, Mapping):
        return {name: _prepared_value(kinds[-1], part, f"{key}.{name}") for name, part in values.items()}
    return [_prepared_value(kinds[-1], part, f"{key}[{index}]") for index, part in enumerate(values)]


def _text_where_wanted(kind: Any, value: Any) -> Any:
    """``execution.label=3`` is a text, though YAML and Hydra read a number."""
    is_number = type(value) in (int, float)
    return str(value) if is_number and kind in TEXTS else value


@functools.cache
def _fields(schema: type) -> dict[str, tuple[Any, Any]]:
    """Type and default of each field of a dataclass; what has a factory or nothing for a default has None."""
    kinds = typing.get_type_hints(schema)
    found = {}
    for item in dataclasses.fields(schema):
        default = None if item.default is dataclasses.MISSING else item.default
        found[item.name] = (kinds[item.name], default)
    return found
