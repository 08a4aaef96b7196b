"""Compose, validate, resolve and identify an experiment's configuration. Torch-free.

Hydra composes the groups that an experiment's file chooses to plain values, once for all cells of a grid. Every
``key=value`` is then put into them, and the whole is typed by the schemas (core/typed.py), as a stored configuration
is. This equals what Hydra makes of the same overrides (tested).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import marshal
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from core.identity import fill_hashes, identity_dict, locate, run_id
from core.overrides import split
from core.remembered import recall, remember
from core.schema import (
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
from core.typed import MissingValue, dump_yaml, load_yaml, read_yaml, typed

__all__ = [
    "REVISIONS", "BackboneConfig", "BudgetConfig", "DataConfig", "EvalConfig", "ExecutionConfig",
    "ExpectedConfig", "ExperimentConfig", "TaskConfig", "TrainConfig", "UserError", "added", "compose", "config_dir",
    "execution", "experiments", "from_yaml", "identity_dict", "is_experiment", "locate", "override", "own_file",
    "read_yaml", "register_schema", "resolve", "run_id", "to_yaml",
]  # fmt: skip

# Compositions of the configuration files, which are read again if these change
REMEMBERED = Path(".cache") / "composed"

# The field of each group's YAML that names its schema when a stored configuration is read back.
_SCHEMA_KEY = {"method": "name", "backbone": "family", "task": "name"}
_PARTS = {
    "data": DataConfig, "train": TrainConfig, "eval": EvalConfig, "execution": ExecutionConfig,
    "expected": list[ExpectedConfig],
}  # fmt: skip


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


def is_experiment(text: str) -> bool:
    """Whether ``text`` is the name of an experiment, or the path of a user's own."""
    return own_file(text) is not None or text in experiments()


def own_file(experiment: str) -> Path | None:
    """The file of a user's own experiment, which is given as a path that ends in .yaml; None for a name."""
    return Path(experiment).expanduser().resolve() if experiment.endswith((".yaml", ".yml")) else None


def compose(experiment: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Validated configuration of ``experiment`` with ``key=value`` overrides; UserError for a mistake.

    ``experiment`` is a name of ``experiments()``, or the path of one's own YAML file of the same form; a run of the
    latter is called like the file.
    """
    file = own_file(experiment)
    _check_exists(experiment, file)
    groups, changes = split(overrides)
    if file is None:
        values = marshal.loads(_composed(experiment, tuple(groups)))
    else:
        values = marshal.loads(_composed_own(file, tuple(groups), _beside(file)))
    for key, value in changes:
        _put(values, key, value)
    try:
        return _config(values)
    except MissingValue as error:
        raise UserError(f"experiment {experiment}: {error}") from None


def _check_exists(experiment: str, file: Path | None) -> None:
    if (file or config_dir() / "experiment" / f"{experiment}.yaml").is_file():
        if experiment.endswith(".yml"):
            raise UserError(f"{experiment}: an experiment's file ends in .yaml")
        return
    if file is not None:
        raise UserError(f"{experiment}: no such file")
    known = experiments()
    allowed = f"all: {', '.join(known)}, or a YAML file"
    raise UserError(f"unknown experiment '{experiment}'{nearest(experiment, known)}; {allowed}")


def override(config: ExperimentConfig, overrides: Sequence[str]) -> ExperimentConfig:
    """A copy of ``config`` with ``key=value`` overrides; UserError for a mistake."""
    groups, changes = split(overrides)
    if groups:
        raise UserError(f"{groups[0]}: a group is chosen before a run exists; give an experiment")
    values = asdict(config)
    for key, value in changes:
        _put(values, key, value)
    return _config(values)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key; a mapping changes the keys that it names."""
    *path, leaf = key.split(".")
    owner: Any = values
    for name in path:
        owner = _part(owner, name)
    if leaf not in _names(owner):
        known = nearest(key, _dotted_keys(values)) or "; see: fewstep config EXPERIMENT"
        raise UserError(f"unknown key '{key}'{known}")
    if "${" in str(value):
        raise UserError(f"{key}={value}: values are taken as they are written; let the shell fill in its variables")
    if isinstance(value, dict):
        for name, part in value.items():
            _put(values, f"{key}.{name}", part)
    else:
        owner[leaf] = value


def _part(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, dict) else None


def _names(values: Any) -> Collection[str]:
    return values if isinstance(values, dict) else ()


def _dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{name}.")


def _config(values: Mapping[str, Any]) -> ExperimentConfig:
    """Plain values as a validated configuration, each group by the schema that its own name stands for."""
    parts = {group: _schema_of(values, group) for group in _SCHEMA_KEY}
    parts |= {name: part for name, part in _PARTS.items() if name in values}
    config = typed(ExperimentConfig, values, parts)
    config.validate()
    return config


def _schema_of(values: Mapping[str, Any], group: str) -> type:
    key = _SCHEMA_KEY[group]
    name = _part(_part(values, group), key)
    if name not in SCHEMAS[group]:
        raise UserError(f"{group}.{key}={name} is unknown; allowed: {', '.join(SCHEMAS[group])}")
    return SCHEMAS[group][name]


@functools.lru_cache(maxsize=256)
def _composed(experiment: str, groups: tuple[str, ...]) -> bytes:
    """Compose an experiment and its groups by Hydra; the values by marshal.

    Remembered on disk: Hydra's import and one composition take a second, as much as the rest of ``grid status``.
    """
    discover_schemas()
    choice = hashlib.blake2b(repr((experiment, groups)).encode()).hexdigest()[:16]
    file = REMEMBERED / f"{_sources_hash(_sources())}-{choice}.json"
    values = recall(file)
    if not isinstance(values, dict) or values.keys() != {item.name for item in fields(ExperimentConfig)}:
        values = _compose_groups(experiment, groups)
        remember(file, values)
    return marshal.dumps(values)


@functools.lru_cache(maxsize=16)
def _composed_own(file: Path, groups: tuple[str, ...], beside: str) -> bytes:
    """``_composed`` of a user's own experiment, made from ``beside``. Remembered by this process alone.

    Nobody but Hydra knows which other files a user's file starts from.
    """
    values = _compose_groups(file.stem, groups, file)
    lacking = {item.name for item in fields(ExperimentConfig)} - values.keys()
    if lacking:
        start = "begin its defaults with /experiment_schema, or with an experiment, e.g. /experiment/flash/emoji"
        raise UserError(f"{file.name} has no {', '.join(sorted(lacking))}; {start}")
    return marshal.dumps(values)


def _beside(file: Path) -> str:
    """Read the YAML files of a user's folder: names and contents as one text, which changes with them."""
    try:
        return repr([(path.name, path.read_bytes()) for path in sorted(file.parent.glob("*.yaml"))])
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


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


def resolve(config: ExperimentConfig, known: dict[str, str] | None = None) -> ExperimentConfig:
    """``config`` with the hashes of weights, data and parent filled in; UserError for a missing folder.

    ``known``: hashes of folders, read and added to, for callers that resolve many configurations at one moment.
    """
    fill_hashes(config, {} if known is None else known)
    return config


def to_yaml(config: ExperimentConfig) -> str:
    """The whole configuration, readable by ``from_yaml``."""
    return dump_yaml(asdict(config))


def from_yaml(text: str, where: str = "config.yaml") -> ExperimentConfig:
    """A stored configuration; a field that is newer than the file gets the value that reproduces the run."""
    try:
        stored = load_yaml(text, "a configuration")
        discover_schemas()
        _forget(stored.get("execution"), ExecutionConfig.gone)
        for group in _SCHEMA_KEY:
            stored[group] = _old_values(_schema_of(stored, group)) | stored[group]
        return _config(_merged(_old_values(ExperimentConfig), stored))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _forget(values: Any, names: Collection[str]) -> None:
    """Leave out the settings that are no longer there."""
    if isinstance(values, dict):
        for name in names:
            values.pop(name, None)


def _old_values(schema: type) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in fields(schema):
        if "reproduces_old" in item.metadata:
            old = item.metadata["reproduces_old"]
            out[item.name] = {**asdict(old), **_old_values(type(old))} if is_dataclass(old) else old
        elif is_dataclass(item.default_factory) and (nested := _old_values(item.default_factory)):
            out[item.name] = nested
    return out


def _merged(values: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with those of ``others`` in their place, part by part."""
    out = dict(values)
    for name, value in others.items():
        both = isinstance(out.get(name), dict) and isinstance(value, dict)
        out[name] = _merged(out[name], value) if both else value
    return out


def _compose_groups(experiment: str, groups: tuple[str, ...], file: Path | None = None) -> dict[str, Any]:
    """The values that Hydra composes for one choice of groups, MISSING where none is given yet.

    ``file``: of a user's own experiment. What lies in its folder is found before what is ours.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    _store_schemas()
    where, folder, name, also = experiment, config_dir(), f"experiment/{experiment}", []
    if file is not None:
        ours = json.dumps(f"file://{config_dir()}")
        where, folder, name, also = file.name, file.parent, file.stem, [f"hydra.searchpath=[{ours}]"]
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            tree = hydra.compose(name, overrides=[*also, *groups])
        values = OmegaConf.to_container(tree)
    except RecursionError:
        raise UserError(f"experiment {where}: its defaults lead back to itself") from None
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(f"experiment {where}: {_first_line(cause)}") from None
    return {**values, "name": experiment}


def _first_line(error: BaseException) -> str:
    key = getattr(error, "full_key", None)
    line, *rest = str(error).strip().splitlines()
    if line.endswith(":") and rest:
        line = f"{line} {rest[0]}"
    return f"{key}: {line}" if key and str(key) not in line else line


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
