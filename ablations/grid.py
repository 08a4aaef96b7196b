"""Grids: load a YAML, check it, and expand it to cells, each of which is one run. Torch-free.

A cell is its run's id: cells of several grids or rows with the same configuration are one run.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablations.schema import Budget, Evaluate, GridSpec, Layout, Row, Scaled
from core.config import ExperimentConfig, UserError, compose, read_yaml, resolve, run_id
from core.schema import check_choice, nearest

FOLDER = Path(__file__).parent
# What may differ between machines: where things lie and how they are executed.
LOCAL = ("*.path", "*_path", "backbone.revision", "eval.batch_size", "execution.*")


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
        """``ROW-sSEED``: how a cell is called in a command and in its folder's label."""
        return f"{self.row}-s{self.seed}"

    @property
    def task(self) -> str:
        """What is to be done: a run and what is measured of it. Rows may measure one run in several ways."""
        return f"{self.id} {self.config.eval}"


@dataclass
class _Expansion:
    """Of one grid at one scale and budget: the cells so far, and the folders' hashes, taken once for all of them."""

    scale: str
    budget: str
    strict: bool
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


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
    local: tuple[str, ...] = ()  # overrides of this machine, for every cell

    def expand(self, scale: str = "emoji", budget: str = "full", *, strict: bool = True) -> list[Cell]:
        """All cells, parents before their children; UserError when a row does not resolve.

        Not ``strict``: a cell whose data or weights are not on this machine has its experiment's name for an id and
        says why, so that a table can show it as a hole.
        """
        if scale not in self.base:
            raise UserError(f"{self.file}: base has no scale '{scale}'; allowed: {', '.join(self.base)}")
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
        overrides, parents = self._overrides(row, seed, found.budget, found.scale), ()
        if row.parent is not None:
            other = next(r for r in self.rows if r.id == row.parent)
            parent = self._add(other, seed, found, (*path, row.id))
            overrides, parents = [*overrides, f"train.init_from={parent.id}"], (parent.id,)
        experiment = row.experiment.get(found.scale, self.base[found.scale])
        unresolved = ""
        with _where(f"{self.file}: row {row.id}"):
            config = compose(experiment, overrides)
            try:
                identity = run_id(resolve(config, found.hashes))
            except UserError as error:
                if found.strict:
                    raise
                identity, unresolved = experiment, str(error)
        if config.scale != found.scale:
            raise UserError(f"{self.file}: row {row.id}: {experiment} is of scale {config.scale}")
        cell = Cell(identity, row.id, row.label, seed, experiment, tuple(overrides), parents, config, unresolved)
        found.cells[row.id, seed] = cell
        return cell

    def _overrides(self, row: Row, seed: int, budget: str, scale: str) -> list[str]:
        """What the grid asks for; the budget's values first, so that a row may set its own."""
        reference = row in self.references
        shared = self.budgets[budget].set  # nothing is trained in a reference, it is only measured
        values = {k: v for k, v in shared.items() if not reference or k.startswith("eval.")} | {
            "eval.metrics": list(self.metrics),
            "eval.splits": list(self.layout.splits),
            "eval.steps": list(self.evaluate.steps),
            **({} if reference else {"eval.at": list(self.evaluate.at)}),
            **row.set,
            **row.at.get(scale, {}),
            "seed": seed,
        }
        label = json.dumps(f"{row.id}-s{seed}")
        texts = (f"{key}={_literal(value)}" for key, value in values.items())
        return [*texts, f"execution.label={label}", *self.local]


def names() -> list[str]:
    """Names of the grids that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, local: Sequence[str] = ()) -> Grid:
    """A grid by name, or by the path of one's own YAML file; UserError names the file and the key.

    ``local``: overrides that say where things lie on this machine, e.g. ``data.path=/data/shards`` (LOCAL).
    """
    for override in local:
        key, equals, _ = override.partition("=")
        if not equals or not any(fnmatch.fnmatchcase(key, pattern) for pattern in LOCAL):
            raise UserError(f"--set {override}: a grid's cells are what its file says; allowed: {', '.join(LOCAL)}")
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = names()
        allowed = f"all: {', '.join(known)}, or a YAML file"
        raise UserError(f"unknown grid '{name}'{nearest(name, known)}; {allowed}")
    with _where(path.name):
        spec = read_yaml(path, GridSpec, "a grid")
        spec.rows.extend(_axis_rows(spec))
        spec.validate()
    return Grid(
        path.stem, Path(path.name), spec.title, spec.source, spec.base, tuple(spec.seeds), tuple(spec.rows),
        tuple(spec.references), spec.budgets, tuple(spec.metrics), spec.evaluate, spec.layout, spec.published, spec.at,
        tuple(local),
    )  # fmt: skip


def _axis_rows(spec: GridSpec) -> Iterator[Row]:
    """Rows of the axes' combinations: id from keys and values, label from the axes' labels."""
    if not spec.axes:
        return
    check_choice("combine", spec.combine, ("product", "zip"))
    axes = [_axis(label, values) for label, values in spec.axes.items()]
    if spec.combine == "zip" and len({len(axis) for axis in axes}) > 1:
        lengths = ", ".join(f"{label} {len(axis)}" for label, axis in zip(spec.axes, axes, strict=True))
        raise UserError(f"axes: zip needs as many values on every axis; got {lengths}")
    keys = {key for axis in axes for key in axis[0]}
    for key in (key for entry in spec.exclude for key in entry):
        check_choice("exclude", key, keys)
    for point in zip(*axes, strict=True) if spec.combine == "zip" else itertools.product(*axes):
        values = {key: value for part in point for key, value in part.items()}
        if not any(entry.items() <= values.items() for entry in spec.exclude):
            name = "-".join(f"{key.rpartition('.')[2]}={_literal(value)}" for key, value in values.items())
            shown = zip(spec.axes, point, strict=True)
            label = ", ".join(f"{axis} = {', '.join(map(_literal, part.values()))}" for axis, part in shown)
            yield Row(id=name.replace("/", "_"), label=label, set=values)


def _axis(label: str, keys: Mapping[str, Any]) -> list[dict[str, Any]]:
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
    if isinstance(value, str) and not value.replace("_", "").replace("-", "").replace("/", "").isalnum():
        return json.dumps(value)
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _where(place: object) -> Iterator[None]:
    """Put a file and a row before a user's mistake."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
