"""Identity of a run: a hash of its full resolved configuration, with weights and data by content. Torch-free.

The whole configuration is hashed, never its difference from the defaults: a changed default gives a new run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from core.remembered import packed, recall, remember
from core.schema import REVISIONS, ExperimentConfig, UserError
from core.splits import HELD_OUT_SHARE, is_split_by_key

SCHEMA_VERSION = 1  # raised when the meaning of an existing field changes
_NOT_WEIGHTS = {".md", ".png", ".jpg", ".log"}  # cards and sample sheets may be edited
_NOT_DATA = {".md", ".sha256"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_RUN_ID = re.compile(r"[0-9a-f]{10}")
MOST_WRITTEN = 4096
_WRITTEN: dict[tuple[type, bytes], str] = {}  # parts of configurations as JSON


def locate(path: str) -> Path:
    """The folder that ``path`` names: ``package:NAME/...`` is relative to an installed package."""
    if not path.startswith("package:"):
        return Path(path).expanduser()
    name, _, rest = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: package {name} is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / rest


def identity_dict(config: Any) -> dict[str, Any]:
    """The part of a (nested) schema instance that decides what is computed, as plain values."""
    out: dict[str, Any] = {}
    for name, old in _identity_fields(type(config)):
        value = getattr(config, name)
        if _is_news(value, old):
            out[name] = identity_dict(value) if dataclasses.is_dataclass(value) else value
    return out


def _is_news(value: Any, old: Any) -> bool:
    """Whether a field's value is to be told: older runs had the field, or did as if it had another value."""
    if dataclasses.is_dataclass(old) and isinstance(value, type(old)):
        return identity_dict(value) != identity_dict(old)
    return old is dataclasses.MISSING or value != old


@functools.cache
def _identity_fields(schema: type) -> list[tuple[str, Any]]:
    """Fields that are not execution, with the value that older runs had, MISSING if they had the field."""
    kept = [item for item in dataclasses.fields(schema) if not item.metadata.get("execution")]
    return [(item.name, item.metadata.get("reproduces_old", dataclasses.MISSING)) for item in kept]


def teacher_identity(config: ExperimentConfig) -> dict[str, str]:
    """Which network teaches, by content: the base's weights and, in a later round of a chain, the parent run.

    Whatever is computed with the teacher and kept (solutions, measurements) is kept under this.
    """
    teacher = {"teacher": config.backbone.weights_hash}
    if config.method.teacher_is_parent:
        assert config.train.parent is not None, "a teacher that is the parent has one"
        teacher["parent"] = config.train.parent
    return teacher


def teacher_problem(config: ExperimentConfig) -> dict[str, Any] | None:
    """``posed_problem`` of a run whose solutions are stored; None: none are."""
    return posed_problem(config) if config.execution.use_solution_store else None


def posed_problem(config: ExperimentConfig) -> dict[str, Any] | None:
    """Everything that decides the teacher's problems: runs that agree in it share solutions. None: they share none.

    Everything downstream of the teacher is absent; of batch size and budget only what decides a sample's problem: how
    many are drawn, and at which each stage begins. A budget in evaluations has none: its stages end at positions that
    depend on the loss terms. Under sharding all processes must call the teacher, or none.
    """
    budget, batch, problem = config.train.budget, config.train.batch_size, config.method.teacher_problem
    if problem is None:
        return None
    if budget.unit == "evaluations" or config.execution.sharding != "none":
        return None
    # Images are counted in the learner's turns; with an update ratio more iterations draw samples
    turn, ratio = (batch, config.method.period) if budget.unit == "images" else (1, 1)
    settings = identity_dict(config.method)
    stages = range(problem.num_stages)
    return {
        **{name: settings[name] for name in problem.fields},
        **teacher_identity(config),
        "seed": config.seed,
        "precision": config.train.precision,
        "samples": -(-budget.amount // turn) * ratio * batch,
        "stages": [-(-stage * budget.amount // (problem.num_stages * turn)) * batch for stage in stages],
    }


def run_id(config: ExperimentConfig) -> str:
    """10 hex digits; ``config`` must have gone through ``core.config.resolve``."""
    assert config.backbone.weights_hash and config.data.data_hash, "resolve the configuration first"
    revision = REVISIONS[config.method.name]
    text = f'{{"config":{_canonical(config)},"method_revision":{revision},"schema_version":{SCHEMA_VERSION}}}'
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def _canonical(config: Any) -> str:
    """The ``identity_dict`` of a schema instance as JSON with sorted keys; equal parts of many are written once."""
    texts = []
    for name, old in sorted(_identity_fields(type(config))):
        value = getattr(config, name)
        if _is_news(value, old):
            texts.append(f'"{name}":{_canonical_part(value) if dataclasses.is_dataclass(value) else _json(value)}')
    return "{" + ",".join(texts) + "}"


def _canonical_part(part: Any) -> str:
    key = type(part), packed(msgspec.to_builtins(part))
    if key not in _WRITTEN:
        if len(_WRITTEN) >= MOST_WRITTEN:
            _WRITTEN.clear()
        _WRITTEN[key] = _json(identity_dict(part))
    return _WRITTEN[key]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fill_hashes(config: ExperimentConfig, known: dict[str, str]) -> None:
    """Set the hashes of weights and data, and the parent, of ``config`` in place; UserError for a missing folder."""
    cache = Path(config.execution.cache_dir)
    backbone, data, train = config.backbone, config.data, config.train
    backbone.weights_hash = _weights_hash(backbone.path, backbone.revision, cache, known)
    data.data_hash = _data_hash(data.path, cache, known)
    for file in config.method.weight_files:
        path = config.method.path_of(file)
        if file.hash is not None and path is not None:
            digest = _source_hash(f"method.{file.path}", path, cache, _NOT_WEIGHTS, known)
            config.method.set_hash_of(file, digest)
    if config.method.teacher_is_parent and train.init_from is None:
        raise UserError("method.teacher=parent: train.init_from is not set; give train.init_from=RUN, the round before")
    train.parent = None if train.init_from is None else _parent_id(train.init_from, cache)


def _weights_hash(path: str, revision: str | None, cache: Path, known: dict[str, str]) -> str:
    is_hub_id = _HUB_ID.fullmatch(path) and not locate(path).exists()
    if is_hub_id:
        return f"hub:{path}@{revision or 'main'}"
    return _source_hash("backbone.path", path, cache, _NOT_WEIGHTS, known)


def _data_hash(path: str, cache: Path, known: dict[str, str]) -> str:
    """The content of a folder of data, and how it is split where the names of its files do not say."""
    if (found := known.get(f"data of {path}")) is not None:
        return found
    digest = _source_hash("data.path", path, cache, _NOT_DATA, known)
    if is_split_by_key(locate(path)):
        digest = hashlib.blake2b(f"{digest} held out {HELD_OUT_SHARE}".encode(), digest_size=8).hexdigest()
    known[f"data of {path}"] = digest
    return digest


def _source_hash(key: str, path: str, cache: Path, ignored: set[str], known: dict[str, str]) -> str:
    if not path:
        raise UserError(f"{key} is not set; give {key}=FOLDER")
    if path.startswith("random:"):  # made from its name alone
        return path
    if (found := known.get(f"{key}={path}")) is not None:
        return found
    folder = locate(path)
    if not folder.is_dir():
        raise UserError(f"{key}={path}: no such folder ({folder.absolute()})")
    try:
        known[f"{key}={path}"] = folder_hash(folder, cache, ignored)
    except UserError as error:
        raise UserError(f"{key}={path}: {error}") from None
    return known[f"{key}={path}"]


def _parent_id(init_from: str, cache: Path) -> str:
    """A run is known by its id, anything else by its content."""
    if _RUN_ID.fullmatch(init_from):
        return init_from
    path = locate(init_from)
    if path.is_dir() and (path / "config.yaml").exists() and _RUN_ID.fullmatch(path.name[-10:]):
        return path.name[-10:]
    if path.is_file():
        try:
            with safe_open(path, "np"):  # reads the names of its tensors
                return _file_hash(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"train.init_from={init_from}: cannot be read as safetensors ({error}); allowed: the id or folder of a "
                "run, or a student.safetensors of its snapshots"
            ) from error
    return _source_hash("train.init_from", init_from, cache, _NOT_WEIGHTS, {})


def folder_hash(folder: Path, cache_dir: Path, ignored: set[str] = frozenset()) -> str:
    """16 hex digits of the names and contents of all files below ``folder``, without hidden ones and suffixes
    ``ignored``. File hashes are remembered in ``cache_dir`` by (path, size, modification time)."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in ignored)
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder}: the folder is empty")
    memory = cache_dir / "file_hashes.json"
    known = recall(memory)
    fresh = {}
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        fresh[key] = known.get(key) or _file_hash(file)
        digest.update(f"{file.relative_to(folder).as_posix()}\0{fresh[key]}\0".encode())
    if not fresh.keys() <= known.keys():
        remember(memory, known | fresh)
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
