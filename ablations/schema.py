"""Schema of a grid's YAML: typed by core/typed.py, values checked here. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.catalogue import KD_EFFNET, METRICS, READINGS
from core.schema import SCALES, UserError, check_choice, check_range, listing


@dataclass
class Row:
    """One line of the table: the base experiment with some values changed."""

    id: str = "???"
    label: str = ""  # the paper's wording; LaTeX math is allowed
    set: dict[str, Any] = field(default_factory=dict)
    at: dict[str, dict[str, Any]] = field(default_factory=dict)  # by scale: what else, e.g. K at a miniature's ratio
    experiment: dict[str, str] = field(default_factory=dict)  # by scale, instead of the grid's base
    seeds: list[int] = field(default_factory=list)  # instead of the grid's seeds
    curve: str = ""  # label of the curve that joins references of one kind, of few steps, in a figure; empty: a line
    parent: str | None = None  # id of the row whose student, of the same seed, this one starts from


@dataclass
class Budget:
    """A part of the full design: fewer seeds, fewer rows, or other values."""

    seeds: list[int] = field(default_factory=list)  # instead of the grid's and its rows' seeds
    rows: list[str] = field(default_factory=list)  # ids; empty: all
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class Layout:
    """Columns of the table, what is best in each, and which splits are shown.

    Claims are judged at the first of ``nfe``, the one that the source reports; tables show all in rising order.
    """

    nfe: list[int] = listing(4)
    splits: list[str] = listing("train", "heldout")
    best: list[str] = field(default_factory=list)  # metrics of which the best value is marked
    costs: list[str] = field(default_factory=list)  # columns read from the trainings' logs


@dataclass
class Evaluate:
    """Sampling steps that students are measured with, and the fractions of the training budget at which they are."""

    steps: list[int] = listing(1, 2, 4)
    at: list[float] = listing(1.0)


@dataclass
class Scaled:
    """Metrics, steps and layout of one scale instead of the grid's own; empty: the same."""

    metrics: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    best: list[str] = field(default_factory=list)


@dataclass
class GridSpec:
    """A grid's file. ``axes`` maps a paper's label to {key: values}; keys of one axis vary together."""

    title: str = "???"
    source: str = ""
    base: dict[str, str] = field(default_factory=dict)  # experiment by scale
    seeds: list[int] = listing(0)
    rows: list[Row] = field(default_factory=list)
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)
    combine: str = "product"  # of several axes: product | zip
    exclude: list[dict[str, Any]] = field(default_factory=list)  # combinations left out, by key and value
    references: list[Row] = field(default_factory=list)  # rows without training, e.g. the teacher
    budgets: dict[str, Budget] = field(default_factory=lambda: {"full": Budget()})
    metrics: list[str] = listing(KD_EFFNET.name)
    evaluate: Evaluate = field(default_factory=Evaluate)
    layout: Layout = field(default_factory=Layout)
    at: dict[str, Scaled] = field(default_factory=dict)  # by scale: other judges, splits and steps
    published: str = ""  # artefact of analysis/published.csv whose numbers stand beside ours, e.g. table_2

    def validate(self) -> None:
        """Raise UserError for the first value not allowed; ``rows`` hold the axes' combinations already."""
        for scaled in (*self.at.values(), self.layout, self.evaluate):
            for metric in [*self.metrics, *getattr(scaled, "metrics", ()), *getattr(scaled, "best", ())]:
                check_choice("metrics", metric, METRICS)
            for metric in getattr(scaled, "best", ()):
                check_choice("layout.best", metric, [name for name in METRICS if METRICS[name].better])
            for steps in getattr(scaled, "steps", ()):
                check_range("evaluate.steps", steps, 1)
        for fraction in self.evaluate.at:
            check_range("evaluate.at", fraction, 0.0, 1.0)
        if 1.0 not in self.evaluate.at:
            raise UserError("evaluate.at lacks 1.0: tables show what is measured at the end")
        for scale in self.at:
            check_choice("at", scale, self.base)
        for scale in self.base:
            check_choice("base", scale, SCALES)
        for row in [*self.rows, *self.references]:
            for scale in row.at:
                check_choice(f"row {row.id}: at", scale, self.base)
        for cost in self.layout.costs:
            check_choice("layout.costs", cost, READINGS)
        if not self.rows:
            raise UserError("rows and axes are both empty; give at least one row")
        if not self.seeds:
            raise UserError("seeds=[] is empty; give at least one number")
        self._validate_ids()

    def _validate_ids(self) -> None:
        ids = [row.id for row in [*self.rows, *self.references]]
        for name in ids:
            if ids.count(name) > 1:
                raise UserError(f"row id '{name}' is used {ids.count(name)} times; ids are unique")
            _check_row_id(name)
        self._validate_references_to_rows([row.id for row in self.rows])

    def _validate_references_to_rows(self, ids: list[str]) -> None:
        """Parents and budgets name rows that the grid has."""
        for row in self.rows:
            if row.curve:
                raise UserError(f"row {row.id}: curve={row.curve} joins references in figures; a row has its own")
            if row.parent is not None:
                check_choice(f"row {row.id}: parent", row.parent, ids)
        for name, budget in self.budgets.items():
            for row in budget.rows:
                check_choice(f"budgets.{name}.rows", row, ids)


def _check_row_id(name: str) -> None:
    if "/" in name or not name:
        raise UserError(f"row id '{name}' is a part of a folder's name: not empty, without '/'")
