"""Grids: load a YAML, check it, and expand it to cells, each of which is one run. Torch-free.

Words, here and in ``slurm``, each with one meaning:

- run: one training, or one teacher that is only measured. Its id is the hash of its configuration.
- cell: a row of a grid at one seed: a run, and how it is measured. Cells with the same configuration share a run.
- work: one training or one measurement of a cell.
- job: a process tree that the scheduler starts; it does the work of one or more cells.
- array task: an element of a SLURM job array, a task for short. The ``task`` of a configuration is another thing.
- state: one word for where a run, cell or job is: planned, trained, running, done, ...
- status: all that is known of a cell or job: its state, where it is, why.
- plan: what a command would do.
- local: on this machine instead of a cluster. What may differ between machines is called ``machine``.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablations.schema import Budget, Evaluate, GridSpec, Layout, Row, Scaled
from core.config import ExperimentConfig, UserError, compose, own_file, read_yaml, resolve, run_id
from core.overrides import split
from core.schema import check_choice, nearest

FOLDER = Path(__file__).parent
_AxisPoint = dict[str, Any]  # values by key, of keys that vary together
# What may differ between machines: where things lie and how they are executed.
OF_ONE_CELL = ("seed=", "execution.label=")
MACHINE_KEYS = ("*.path", "*_path", "backbone.revision", "eval.batch_size", "execution.*")


@dataclass(frozen=True)
class Cell:
    """A row of a grid at one seed: a run, and how it is measured."""

    id: str
    row: str
    label: str
    seed: int
    experiment: str
    overrides: tuple[str, ...]
    parents: tuple[str, ...]
    config: ExperimentConfig = field(repr=False, compare=False)
    unresolved: str = ""  # why this machine cannot say which run it is: data or weights are not here

    @property
    def name(self) -> str:
        """The cell's name in commands and in its folder's label: ``ROW-sSEED``."""
        return f"{self.row}-s{self.seed}"

    @property
    def key(self) -> str:
        """The run and what is measured of it: cells with one key ask for the same. Rows may share a run."""
        return f"{self.id} {self.config.eval}"


@dataclass
class _Expansion:
    """The cells of a grid so far, at one scale and budget; the folders' hashes and the rows' overrides, made once."""

    scale: str
    budget: str
    strict: bool
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    alike: dict[tuple[str, ...], ExperimentConfig] = field(default_factory=dict)  # of a row, by what its seeds share
    texts: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A checked grid; ``rows`` hold the combinations of its axes."""

    name: str
    file: Path
    title: str
    source: str
    base: Mapping[str, str]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    references: tuple[Row, ...]
    budgets: Mapping[str, Budget]
    metrics: tuple[str, ...]
    evaluate: Evaluate
    layout: Layout
    published: str
    at: Mapping[str, Scaled]
    machine: tuple[str, ...] = ()  # overrides of this machine, for every cell

    def expand(self, scale: str = "emoji", budget: str = "full", *, strict: bool = True) -> list[Cell]:
        """All cells, parents before their children; UserError when a row does not resolve.

        Not ``strict``: a cell whose data or weights are not on this machine has its experiment's name for an id and
        says why, so that a table can show it as a hole.
        """
        if scale not in self.base:
            allowed = f"allowed: {', '.join(self.base)}{nearest(scale, self.base)}"
            raise UserError(f"{self.file}: base has no scale '{scale}'; {allowed}")
        if scale in self.at:
            return self.scaled(scale).expand(scale, budget, strict=strict)
        with _where(self.file):
            check_choice("budget", budget, self.budgets)
        found = _Expansion(scale, budget, strict)
        for row in self.rows_of(budget):
            for seed in self.budgets[budget].seeds or row.seeds or self.seeds:
                self._add(row, seed, found)
        for row in self.references:
            for seed in row.seeds or (0,):
                self._add(row, seed, found)
        return list(found.cells.values())

    def scaled(self, scale: str) -> Grid:
        """The grid as ``scale`` measures and shows it."""
        own = self.at.get(scale)
        if own is None:
            return self
        layout = replace(
            self.layout,
            nfe=own.nfe or self.layout.nfe,
            splits=own.splits or self.layout.splits,
            best=own.best or self.layout.best,
        )
        evaluate = replace(self.evaluate, steps=own.steps or self.evaluate.steps)
        return replace(self, metrics=tuple(own.metrics or self.metrics), layout=layout, evaluate=evaluate, at={})

    def rows_of(self, budget: str) -> list[Row]:
        """The rows that ``budget`` computes."""
        chosen = self.budgets[budget].rows
        return [row for row in self.rows if not chosen or row.id in chosen]

    def _add(self, row: Row, seed: int, found: _Expansion, path: tuple[str, ...] = ()) -> Cell:
        """The cell of ``row`` at ``seed``, its parent's first."""
        if row.id in path:
            raise UserError(f"{self.file}: rows {' -> '.join([*path, row.id])} are each other's parents")
        if (row.id, seed) in found.cells:
            return found.cells[row.id, seed]
        overrides, parents = self._overrides(row, seed, found), ()
        if row.parent is not None:
            other = next(r for r in self.rows if r.id == row.parent)
            parent = self._add(other, seed, found, (*path, row.id))
            overrides, parents = [*overrides, f"train.init_from={parent.id}"], (parent.id,)
        experiment = row.experiment.get(found.scale, self.base[found.scale])
        unresolved = ""
        with _where(f"{self.file}: row {row.id}"):
            config = _composed(experiment, overrides, found)
            try:
                identity = run_id(resolve(config, found.hashes))
            except UserError as error:
                if found.strict:
                    raise
                identity, unresolved = config.name, str(error)
        if config.scale != found.scale:
            raise UserError(f"{self.file}: row {row.id}: {config.name} is of scale {config.scale}")
        cell = Cell(identity, row.id, row.label, seed, experiment, tuple(overrides), parents, config, unresolved)
        found.cells[row.id, seed] = cell
        return cell

    def _overrides(self, row: Row, seed: int, found: _Expansion) -> list[str]:
        """The overrides that the grid asks for; the budget's values first, so that a row may set its own."""
        if row.id not in found.texts:
            found.texts[row.id] = self._texts(row, found.budget, found.scale)
        texts = found.texts[row.id] | {"seed": f"seed={seed}"}
        label = json.dumps(f"{row.id}-s{seed}")
        return [*texts.values(), f"execution.label={label}", *self.machine]

    def _texts(self, row: Row, budget: str, scale: str) -> dict[str, str]:
        """The overrides of a row's cells by key; each has a seed of its own."""
        reference = row in self.references
        shared = self.budgets[budget].set  # nothing is trained in a reference, it is only measured
        values = {k: v for k, v in shared.items() if not reference or k.startswith("eval.")} | {
            "eval.metrics": list(self.metrics),
            "eval.splits": list(self.layout.splits),
            "eval.steps": list(self.evaluate.steps),
            **({} if reference else {"eval.at": list(self.evaluate.at)}),
            **row.set,
            **row.at.get(scale, {}),
        }
        return {key: f"{key}={_literal(value)}" for key, value in values.items()}


def _composed(experiment: str, overrides: Sequence[str], found: _Expansion) -> ExperimentConfig:
    """The configuration of a cell, which shares its parts with those of the row's other seeds: none is written into."""
    key = experiment, *(text for text in overrides if not text.startswith(OF_ONE_CELL))
    like = found.alike.get(key)
    if like is None:
        like = found.alike[key] = compose(experiment, overrides)
        return like
    values = dict(split(overrides)[1])
    execution = replace(like.execution, label=str(values["execution.label"]))
    return replace(like, seed=values["seed"], execution=execution)


def names() -> list[str]:
    """Names of the grids that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, machine: Sequence[str] = ()) -> Grid:
    """A grid by name, or by the path of one's own YAML file; UserError names the file and the key.

    ``machine``: overrides of this machine, e.g. where data lie: ``data.path=/data/shards`` (MACHINE_KEYS).
    """
    for override in machine:
        _check_machine_key(override)
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = names()
        allowed = f"all: {', '.join(known)}, or a YAML file"
        raise UserError(f"unknown grid '{name}'{nearest(name, known)}; {allowed}")
    with _where(path.name):
        spec = read_yaml(path, GridSpec, "a grid")
        spec.rows.extend(_axis_rows(spec))
        spec.validate()
    _find_experiments(spec, path.parent)
    return Grid(
        path.stem, Path(path.name), spec.title, spec.source, spec.base, tuple(spec.seeds), tuple(spec.rows),
        tuple(spec.references), spec.budgets, tuple(spec.metrics), spec.evaluate, spec.layout, spec.published, spec.at,
        tuple(machine),
    )  # fmt: skip


def _find_experiments(spec: GridSpec, folder: Path) -> None:
    """Let experiments that are files of one's own lie beside the grid's file."""
    for choice in (spec.base, *(row.experiment for row in (*spec.rows, *spec.references))):
        for scale, name in choice.items():
            if own_file(name) is not None:
                choice[scale] = str((folder / name).resolve())


def _check_machine_key(override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not any(fnmatch.fnmatchcase(key, pattern) for pattern in MACHINE_KEYS):
        allowed = ", ".join(MACHINE_KEYS)
        raise UserError(f"--set {override}: a grid's cells are what its file says; allowed: {allowed}")


def _axis_rows(spec: GridSpec) -> Iterator[Row]:
    """Rows of the axes' combinations: id from keys and values, label from the axes' labels."""
    if not spec.axes:
        return
    check_choice("combine", spec.combine, ("product", "zip"))
    axes = [_axis(label, values) for label, values in spec.axes.items()]
    points = _points(spec, axes)
    keys = {key for axis in axes for key in axis[0]}
    for key in itertools.chain(*spec.exclude):
        check_choice("exclude", key, keys)
    for point in points:
        values = dict(itertools.chain(*(part.items() for part in point)))
        if not _is_excluded(values, spec.exclude):
            yield Row(id=_axis_row_id(values), label=_axis_row_label(spec.axes, point), set=values)


def _points(spec: GridSpec, axes: Sequence[list[_AxisPoint]]) -> Iterable[tuple[_AxisPoint, ...]]:
    """Combinations of one point of every axis; UserError when axes to be zipped differ in length."""
    if spec.combine == "product":
        return itertools.product(*axes)
    if len(set(map(len, axes))) > 1:
        lengths = ", ".join(f"{label} {len(axis)}" for label, axis in zip(spec.axes, axes, strict=True))
        raise UserError(f"axes: zip needs as many values on every axis; got {lengths}")
    return zip(*axes, strict=True)


def _is_excluded(values: _AxisPoint, exclude: Iterable[_AxisPoint]) -> bool:
    return any(entry.items() <= values.items() for entry in exclude)


def _axis_row_id(values: _AxisPoint) -> str:
    """``num_timesteps=16-batch_size=8``: without the keys' groups, and fit for a folder's name."""
    parts = (f"{key.rpartition('.')[2]}={_literal(value)}" for key, value in values.items())
    return "-".join(parts).replace("/", "_")


def _axis_row_label(axes: Iterable[str], point: Sequence[_AxisPoint]) -> str:
    """``K = 16, batch = 8, 64``: all values of an axis after its label."""
    parts = []
    for label, values in zip(axes, point, strict=True):
        parts.append(f"{label} = {', '.join(map(_literal, values.values()))}")
    return ", ".join(parts)


def _axis(label: str, keys: Mapping[str, Any]) -> list[_AxisPoint]:
    """Points of one axis; its keys vary together."""
    lengths = {len(v) if isinstance(v, list) else 0 for v in keys.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise UserError(f"axes.{label}: give every key a list of values, all of one length")
    return [dict(zip(keys, point, strict=True)) for point in zip(*keys.values(), strict=True)]


def _literal(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and _is_word(value):
        return value
    return json.dumps(value)


def _is_word(text: str) -> bool:
    """Whether the grammar takes the text without quotes."""
    return text.replace("_", "").replace("-", "").replace("/", "").isalnum()


@contextlib.contextmanager
def _where(place: object) -> Iterator[None]:
    """Put a file and a row before a user's mistake."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
