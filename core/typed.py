"""Plain values, of YAML or of a command line, as dataclasses: one check of types for all that users write. Torch-free.

msgspec types the values by the dataclasses' annotations: whole numbers become floats where floats are wanted, texts
become the numbers that they spell. What it does not do is done here: unknown keys and missing values are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import marshal
import re
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from core.remembered import packed
from core.schema import MISSING, UserError, nearest

T = TypeVar("T")
Preparer = Callable[[Any, str], Any]

TEXTS = (str, str | None)
# msgspec's words for what YAML calls otherwise
WORDS = {"array": "list", "object": "mapping"}


class MissingValue(UserError):
    """A mandatory key that nobody has given a value."""


def load_yaml(text: str, noun: str) -> dict[str, Any]:
    """The mapping that a YAML text holds; UserError, one line, for anything else. ``noun``: what it should be."""
    import yaml

    try:
        values = yaml.load(text, _loader())  # noqa: S506  a safe loader's child
    except yaml.YAMLError as error:
        raise UserError(" ".join(str(error).split())) from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise UserError(f"not {noun} (a mapping is expected)")
    return values


# The floats of YAML 1.2, 1e-5 among them, as OmegaConf reads them
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


@functools.cache
def _loader() -> type:
    """The C library's safe loader, if it is there, with OmegaConf's rules: its own takes 60 ms for a configuration.

    1e-5 is a number, a date a text, and a key that comes twice an error. OmegaConf takes as long to import as a grid of
    a hundred cells to expand.
    """
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    place = node.value[number][0].start_mark
                    raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key}", place)
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    for first, rules in Loader.yaml_implicit_resolvers.items():
        kept = [(tag, form) for tag, form in rules if tag != "tag:yaml.org,2002:timestamp"]
        Loader.yaml_implicit_resolvers[first] = kept
    return Loader


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


def typed(schema: type[T], values: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> T:
    """``values`` as the dataclass ``schema``; ``parts``: types of fields, instead of those that it declares.

    Parts are validated, too.

    Raises:
        UserError: a key that is unknown, a mandatory one without a value, a value of another type, or, in a part, one
            that is not allowed; it names the key.
    """
    own = {name: _part(kind, values[name], name) for name, kind in (parts or {}).items()}
    rest = {name: value for name, value in values.items() if name not in own}
    result = _typed(schema, rest, "", given=own)
    for name, part in own.items():
        setattr(result, name, part)
    return result


def _part(kind: Any, values: Any, name: str) -> Any:
    """``values`` as a field's type. Equal values are checked once: the cells of a grid differ in few parts."""
    try:
        key = packed(values)
    except ValueError:
        return _checked(kind, values, name)
    known = _known_part(kind, key, name)
    return msgspec.convert(msgspec.to_builtins(known), kind)  # a copy: configurations are written into


@functools.lru_cache(maxsize=4096)
def _known_part(kind: Any, key: bytes, name: str) -> Any:
    return _checked(kind, marshal.loads(key), name)


def _checked(kind: Any, values: Any, name: str) -> Any:
    """Typed and validated: a dataclass, or a list of them."""
    is_one = dataclasses.is_dataclass(kind)
    result = _typed(kind, values, f"{name}." if is_one else name)
    for part in [result] if is_one else result:
        part.validate()
    return result


def _typed(kind: Any, values: Any, prefix: str, given: Collection[str] = ()) -> Any:
    """``values`` as a dataclass or a list of them; ``given``: fields that lie elsewhere and are not missing."""
    if dataclasses.is_dataclass(kind):
        prepared = _prepared(kind, values, prefix, given)
    else:
        prepared = _preparer(kind)(values, prefix)
    try:
        return msgspec.convert(prepared, kind, strict=False)
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
    for name, (default, prepare) in known.items():
        if name in given:
            continue
        value = values.get(name, default)
        if isinstance(value, str) and value == MISSING:
            raise MissingValue(f"{prefix}{name} has no value; give {prefix}{name}=VALUE")
        if name in values:
            out[name] = value if prepare is None else prepare(value, f"{prefix}{name}")
    return out


@functools.cache
def _fields(schema: type) -> dict[str, tuple[Any, Preparer | None]]:
    """Default of each field of a dataclass, and how its values are prepared.

    What has a factory or nothing for a default has None.
    """
    kinds = typing.get_type_hints(schema)
    found = {}
    for item in dataclasses.fields(schema):
        default = None if item.default is dataclasses.MISSING else item.default
        found[item.name] = (default, _preparer(kinds[item.name]))
    return found


def _preparer(kind: Any) -> Preparer | None:
    """A function of a value and its key that prepares values of this type; None: they are taken as they are."""
    if dataclasses.is_dataclass(kind):
        return lambda value, key: _prepared(kind, value, f"{key}.")
    if kind in TEXTS:
        return _text_where_wanted
    parts = typing.get_args(kind)
    prepare = _preparer(parts[-1]) if parts else None  # of a list or a mapping
    return None if prepare is None else functools.partial(_prepared_parts, prepare)


def _prepared_parts(prepare: Preparer, values: Any, key: str) -> Any:
    """The parts of a list or a mapping, each prepared; anything else as it is."""
    if isinstance(values, Mapping):
        return {name: prepare(part, f"{key}.{name}") for name, part in values.items()}
    if isinstance(values, list):
        return [prepare(part, f"{key}[{index}]") for index, part in enumerate(values)]
    return values


def _text_where_wanted(value: Any, key: str) -> Any:
    """``execution.label=3`` is a text, though YAML and Hydra read a number."""
    return str(value) if type(value) in (int, float) else value
