"""Compose, validate, resolve and identify an experiment's configuration. Torch-free.

Hydra composes the groups that an experiment's file chooses; every ``key=value`` is then applied by OmegaConf
on the typed tree, which equals Hydra's own application (tested) and lets a grid compose once for all cells.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from core.identity import fill_hashes, identity_dict, locate, run_id
from core.overrides import fitting, own, split
from core.remembered import recall, remember
from core.schema import (
    MISSING,
    REVISIONS,
    SCHEMAS,
    BackboneConfig,
    BudgetConfig,
    DataConfig,
    EvalConfig,
    ExecutionConfig,
    ExpectedConfig,
    ExperimentConfig,
    TaskConfig,
    TrainConfig,
    UserError,
    added,
    discover_schemas,
    execution,
    nearest,
    register_schema,
)

__all__ = [
    "REVISIONS", "BackboneConfig", "BudgetConfig", "DataConfig", "EvalConfig", "ExecutionConfig",
    "ExpectedConfig", "ExperimentConfig", "TaskConfig", "TrainConfig", "UserError", "added", "compose", "config_dir",
    "execution", "experiments", "from_yaml", "identity_dict", "locate", "read_yaml", "register_schema", "resolve",
    "run_id", "to_yaml",
]  # fmt: skip

T = TypeVar("T")

# Compositions of the configuration files, which are read again if these change
REMEMBERED = Path(".cache") / "composed"

# The field of each group's YAML that names its schema when a stored configuration is read back.
_SCHEMA_KEY = {"method": "name", "backbone": "family", "task": "name"}


@functools.cache
def config_dir() -> Path:
    """The folder of the configuration files: data of the package above this one, found without importing it."""
    spec = importlib.util.find_spec("experiments")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "config"


def experiments() -> list[str]:
    """Names of all experiments, e.g. ``flash/emoji``."""
    root = config_dir() / "experiment"
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def compose(experiment: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Validated configuration of ``experiment`` with ``key=value`` overrides; UserError for a mistake."""
    if not (config_dir() / "experiment" / f"{experiment}.yaml").is_file():
        known = experiments()
        close = nearest(experiment, known)
        raise UserError(f"unknown experiment '{experiment}'{close}; all: {', '.join(known)}")
    groups, values = split(overrides)
    config = _changed(experiment, tuple(groups), values)
    return config or compose_in_full(experiment, groups, values)


def compose_in_full(experiment: str, groups: Sequence[str], values: Sequence[tuple[str, Any]]) -> ExperimentConfig:
    """The configuration that ``compose`` gives, slowly: OmegaConf applies every value to the typed tree."""
    tree = _compose_groups(experiment, tuple(groups)).copy()
    for key, value in values:
        _apply(tree, key, value)
    return _to_config(tree, f"experiment {experiment}")


def _changed(experiment: str, groups: tuple[str, ...], values: Sequence[tuple[str, Any]]) -> ExperimentConfig | None:
    """The composed object with converted values set in place; None where only the full way knows what is meant.

    A grid of a thousand cells composes once: copying a typed tree costs twenty times as much as copying its object.
    """
    base = _base_object(experiment, groups)
    if base is None:
        return None
    config = pickle.loads(base)  # a fifth of the time of a deep copy
    for key, value in values:
        *path, leaf = key.split(".") if isinstance(key, str) else [""]
        owner: Any = config
        for name in path:
            owner = getattr(owner, name, None)
        if not is_dataclass(owner) or isinstance(value, dict) or is_dataclass(getattr(owner, leaf, owner)):
            return None
        text = json.dumps(_rows_of_floats(value))
        if "${" in text or value == MISSING:
            return None
        taken = fitting(value, getattr(owner, leaf))
        if taken is not None:
            setattr(owner, leaf, taken)
            continue
        try:
            setattr(owner, leaf, own(_converted(experiment, groups, key, text)))
        except Exception:
            return None
    config.validate()
    return config


@functools.lru_cache(maxsize=256)
def _base_object(experiment: str, groups: tuple[str, ...]) -> bytes | None:
    """The composed tree as a pickled object; None as long as one of its values is missing.

    Remembered on disk: Hydra's import and one composition take a second, as much as the rest of ``grid status``.
    """
    discover_schemas()
    choice = hashlib.blake2b(repr((experiment, groups)).encode()).hexdigest()[:16]
    file = REMEMBERED / f"{_sources_hash(_sources())}-{choice}.json"
    with contextlib.suppress(KeyError, TypeError):
        return pickle.dumps(_rebuilt(ExperimentConfig, recall(file)))
    from omegaconf import OmegaConf

    tree = _compose_groups(experiment, groups)
    if OmegaConf.missing_keys(tree):
        return None
    config = OmegaConf.to_object(tree)
    remember(file, asdict(config))
    return pickle.dumps(config)


def _sources() -> tuple[Path, ...]:
    """The files that a composition is made from: YAML, and the sources of all schemas, a user's own included."""
    files = {*config_dir().rglob("*.yaml")}
    for schema in (ExperimentConfig, *itertools.chain.from_iterable(map(dict.values, SCHEMAS.values()))):
        for part in schema.__mro__:
            file = getattr(sys.modules[part.__module__], "__file__", None)
            if file is not None:
                files.add(Path(file))
    return tuple(sorted(files))


@functools.cache
def _sources_hash(files: tuple[Path, ...]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _rebuilt(schema: type, values: Mapping[str, Any]) -> Any:
    """The inverse of ``asdict``; KeyError or TypeError for what it has not written."""
    parts = {}
    for item in fields(schema):
        value = values[item.name]
        if item.name == "method" and schema is ExperimentConfig:
            value = _rebuilt(SCHEMAS["method"][value["name"]], value)
        elif is_dataclass(item.default_factory):
            value = _rebuilt(item.default_factory, value)
        elif "rows" in item.metadata:
            value = [_rebuilt(item.metadata["rows"], row) for row in value]
        parts[item.name] = value
    return schema(**parts)


@functools.lru_cache(maxsize=4096)
def _converted(experiment: str, groups: tuple[str, ...], key: str, text: str) -> Any:
    """The JSON ``text`` as the leaf ``key`` of the typed tree would hold it; an OmegaConf error when it does not fit.

    Most overrides are the same in all cells of a grid.
    """
    from omegaconf import OmegaConf

    *path, leaf = key.split(".")
    parent, value = _compose_groups(experiment, groups), json.loads(text)
    for name in path:
        parent = parent[name]
    node = copy.deepcopy(parent._get_node(leaf))
    node._set_parent(None)
    node._set_value(value)
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) and node._value() is not None else node._value()


def resolve(config: ExperimentConfig, known: dict[str, str] | None = None) -> ExperimentConfig:
    """``config`` with the hashes of weights, data and parent filled in; UserError for a missing folder.

    ``known``: hashes of folders, read and added to, for callers that resolve many configurations at one moment.
    """
    fill_hashes(config, {} if known is None else known)
    return config


def to_yaml(config: ExperimentConfig) -> str:
    """The whole configuration, readable by ``from_yaml``."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str, where: str = "config.yaml") -> ExperimentConfig:
    """A stored configuration; a field that is newer than the file gets the value that reproduces the run."""
    from omegaconf import OmegaConf

    with _one_line(where):
        stored = OmegaConf.to_container(OmegaConf.create(text))
        if not isinstance(stored, dict):
            raise UserError(f"{where}: not a configuration (a mapping is expected)")
        discover_schemas()
        schemas = {group: _schema_of(stored, group, key, where) for group, key in _SCHEMA_KEY.items()}
        tree = OmegaConf.structured(ExperimentConfig)
        for group, schema in schemas.items():
            tree[group] = OmegaConf.structured(schema)
            stored[group] = _old_values(schema) | stored[group]
        tree = OmegaConf.merge(tree, _old_values(ExperimentConfig), stored)
    return _to_config(tree, where)


def _schema_of(stored: Mapping[str, Any], group: str, key: str, where: str) -> type:
    part = stored.get(group)
    name = part.get(key) if isinstance(part, dict) else None
    if name not in SCHEMAS[group]:
        raise UserError(f"{where}: {group}.{key}={name} is unknown; allowed: {', '.join(SCHEMAS[group])}")
    return SCHEMAS[group][name]


def _old_values(schema: type) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in fields(schema):
        if "reproduces_old" in item.metadata:
            out[item.name] = item.metadata["reproduces_old"]
        elif is_dataclass(item.default_factory) and (nested := _old_values(item.default_factory)):
            out[item.name] = nested
    return out


@functools.lru_cache(maxsize=256)
def _compose_groups(experiment: str, groups: tuple[str, ...]) -> Any:
    """Typed tree of one choice of groups; ``copy()`` before changing it."""
    import hydra
    from omegaconf import OmegaConf, open_dict

    _store_schemas()
    root = str(config_dir())
    with _one_line(f"experiment {experiment}"), hydra.initialize_config_dir(root, version_base="1.3"):
        tree = hydra.compose(f"experiment/{experiment}", overrides=list(groups))
    with open_dict(tree):
        tree.name = experiment
    OmegaConf.set_struct(tree, True)
    return tree


def _store_schemas() -> None:
    """Tell Hydra of every schema, also of those that were registered since it was last told."""
    discover_schemas()
    _store(None, "experiment_schema", ExperimentConfig)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            _store(group, name, schema)


@functools.cache
def _store(group: str | None, name: str, schema: type) -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group=group, name=name, node=schema)


def _apply(tree: Any, key: str, value: Any) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(key, str) or OmegaConf.select(tree, key, default=_ABSENT) is _ABSENT:
        known = _dotted_keys(tree)
        if key not in known:  # a value that is still missing is known, and not found by ``select``
            raise UserError(f"unknown key '{key}'{nearest(key, known) or '; see: fewstep config EXPERIMENT'}")
    try:
        OmegaConf.update(tree, key, _rows_of_floats(value), merge=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{key}={value}: {str(error).splitlines()[0]}") from None


_ABSENT = object()


def _rows_of_floats(value: Any) -> Any:
    """OmegaConf turns 0 into 0.0 in a list but not in a list of lists; all of ours hold weights."""
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        return [[float(x) if type(x) is int else x for x in row] for row in value]
    return value


def _dotted_keys(tree: Any, prefix: str = "") -> list[str]:
    from omegaconf import DictConfig

    out = []
    for key in tree:
        node = tree._get_node(key)
        out.append(f"{prefix}{key}")
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            out.extend(_dotted_keys(node, f"{prefix}{key}."))
    return out


def _to_config(tree: Any, where: str) -> ExperimentConfig:
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise UserError(f"{where}: {missing[0]} has no value; give {missing[0]}=VALUE")
    with _one_line(where):
        config = OmegaConf.to_object(tree)
    assert isinstance(config, ExperimentConfig)
    config.validate()
    return config


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Turn the errors of Hydra, OmegaConf and YAML into one line that names the file."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(f"{where}: {_first_line(cause)}") from None


def _first_line(error: BaseException) -> str:
    key = getattr(error, "full_key", None)
    line = str(error).strip().splitlines()[0]
    return f"{key}: {line}" if key and str(key) not in line else line


def read_yaml(path: Path, schema: type[T], noun: str) -> T:
    """A YAML file typed by a dataclass; UserError, one line that names the key, for what does not fit."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        text = OmegaConf.load(path)
        if not isinstance(text, DictConfig):
            raise UserError(f"not {noun} (a mapping is expected)")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), text))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        line = str(error).splitlines()[0]
        raise UserError(f"{key}: {line}" if key and str(key) not in line else line) from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(" ".join(str(error).split())) from None
