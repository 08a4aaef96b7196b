"""Numbers for the prose of result pages: every function looks one up in the runs of a grid and gives it as text.

Grids and rows are named by their ids. ``split`` is ``train`` or ``heldout``; ``nfe`` (network evaluations of a sample)
defaults to the one that the grid's source reports, the first of its layout. UserError names what does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from analysis.artefacts.budgets import moments
from analysis.artefacts.context import Context
from analysis.collect import CellRun, values_by_seed
from analysis.columns import column, shown_column
from analysis.inference import Estimate, ratio_interval, variance
from analysis.labels import without_math
from analysis.render import claims_markdown, difference, number, to_markdown, verdicts_markdown
from analysis.tables import PUBLISHED, REFERENCE, Block, Line, Panel, Table
from analysis.training import logged
from analysis.verdicts import Judgement, counts
from core.metrics.cost import training_cost
from core.schema import UserError, check_choice


@dataclass(frozen=True)
class Facts:
    """The functions that a page's template may call."""

    context: Context

    # --- whole tables ---------------------------------------------------------------------------------------

    def table(self, name: str, nfe: Sequence[int] = ()) -> str:
        """A grid's table as ``fewstep table`` prints it, without its claims; ``nfe``: these blocks alone."""
        table = self._table(name)
        if nfe:
            table = replace(table, panels=tuple(_narrowed(panel, nfe) for panel in table.panels))
        return to_markdown(replace(table, judgements=()), folded=True).rstrip()

    def verdicts(self, names: Sequence[str]) -> str:
        """One line for each claim about these grids, with its verdict on either split of captions."""
        return verdicts_markdown(self._judgements(names))

    def claims(self, names: Sequence[str]) -> str:
        """Every contrast of the claims about these grids with its interval, and the count of verdicts."""
        return claims_markdown(self._judgements(names))

    def tally(self, names: Sequence[str]) -> str:
        """``14 reproduced, 4 contradicted, 13 inconclusive``."""
        return ", ".join(f"{count} {verdict}" for verdict, count in counts(self._judgements(names)).items())

    def tally_together(self, names: Sequence[str] = ()) -> str:
        """``tally`` when the claims of all grids are seen together; no names: of all grids."""
        judgements = self._judgements(names) if names else self.context.judgements
        return ", ".join(f"{count} {verdict}" for verdict, count in counts(judgements, together=True).items())

    def num_judgements(self) -> str:
        """How many judgements there are, each claim on each split of captions."""
        return str(len(self.context.judgements))

    def glossary(self) -> str:
        """A list of the metrics in the tables with their meanings."""
        metrics = dict.fromkeys(c.metric for table in self.context.tables.values() for c in table.columns)
        shown = [column(metric) for metric in metrics]
        return "\n".join(f"- **{c.label}** (`{c.metric}`): {c.meaning}." for c in shown)

    def title(self, name: str) -> str:
        """A grid's title as plain text."""
        return without_math(self._table(name).title)

    # --- numbers of one row ---------------------------------------------------------------------------------

    def value(self, name: str, row: str, metric: str, split: str = "train", nfe: int | None = None) -> str:
        """The number as the grid's table shows it: ``2.05 ± 0.01``."""
        table = self._table(name)
        index = self._column(table, metric)
        found = self._line(table, self._row(name, row), split, nfe or self._nfe(name)).entries[index].summary
        if found.n == 0:
            raise UserError(f"{name}: row {row} has no {metric} on {split} captions")
        return number(found, table.digits[index])

    def both(self, name: str, row: str, metric: str, nfe: int | None = None) -> str:
        """On training captions / on held-out captions."""
        return " / ".join(self.value(name, row, metric, split, nfe) for split in ("train", "heldout"))

    def during(self, name: str, row: str, fraction: float) -> str:
        """The kernel distance on training captions after ``fraction`` of the iterations."""
        found = moments(self.context.grids[name], self._row(name, row))
        last = max(place["iteration"] for place, _ in found)
        _, summary = min(found, key=lambda moment: abs(moment[0]["iteration"] - fraction * last))
        return f"{summary.mean:.2f}"

    def logged(self, name: str, row: str, key: str, digits: int = 3) -> str:
        """A quantity of the training's log, averaged over its second half and over seeds."""
        means = []
        for item in self._runs(name, row):
            values = logged(item.first.run, key)
            means.append(fmean(values[len(values) // 2 :]))
        return f"{fmean(means):.{digits}f}"

    def evaluations(self, name: str, row: str) -> str:
        """Network evaluations of all roles in one training, in thousands (mean over seeds)."""
        spent = [training_cost(item.first.run.metrics()).evaluations for item in self._runs(name, row)]
        return f"{fmean(sum(roles.values()) for roles in spent) / 1000:,.0f},000"

    # --- rows against each other ----------------------------------------------------------------------------

    def difference(self, claim: str, split: str = "train", contrast: int = 0) -> str:
        """The seed-paired difference of one contrast of a claim (claims.yaml) with its 95% interval."""
        for table in self.context.tables.values():
            for judgement in table.judgements:
                if judgement.claim.id == claim and judgement.split in (split, ""):
                    return difference(judgement.comparisons[contrast])
        raise UserError(f"no claim {claim} on {split} captions")

    def closed(
        self, name: str, row: str, between: tuple[str, str], metric: str, split: str, nfe: int | None = None
    ) -> str:
        """How much of the gap between two references a row closes, with its 95% interval: ``84% [71, 97]``.

        The interval is Fieller's: the gap is measured, too. A reference that is measured once counts as known.
        """
        start, goal = (self._raw(name, each, metric, split) for each in between)
        ours = self._raw(name, row, metric, split, nfe)
        top, bottom = (_difference(start, other) for other in (ours, goal))
        shared = variance(list(start.values())) / len(start) if len(start) > 1 else 0.0
        share = _percent(top.mean / bottom.mean)
        if len(ours) < 2:
            return share
        low, high = ratio_interval(top, bottom, shared)
        if math.isinf(low):
            return f"{share} (the gap may be nothing)"
        return f"{share} [{100 * low:.0f}, {100 * high:.0f}]".replace("-", "−")

    def change(self, name: str, row: str, versus: str, metric: str, split: str, nfe: int | None = None) -> str:
        """The relative difference of a row to another or to a reference: ``−3.7%``."""
        ours, theirs = (fmean(self._raw(name, each, metric, split, nfe).values()) for each in (row, versus))
        return f"{ours / theirs - 1:+.1%}".replace("-", "−")

    def seeds_lower(self, name: str, row: str, versus: str, metric: str, split: str) -> str:
        """In how many seeds a row is below another: ``2 of 3``."""
        ours, theirs = (self._raw(name, each, metric, split) for each in (row, versus))
        shared = ours.keys() & theirs.keys()
        return f"{sum(ours[seed] < theirs[seed] for seed in shared)} of {len(shared)}"

    # --- what grids cost ------------------------------------------------------------------------------------

    def num_trainings(self, names: Sequence[str]) -> str:
        """How many different trainings the grids have together."""
        return str(len(self._trained(names)))

    def hours(self, names: Sequence[str]) -> str:
        """Device-hours of those trainings, each counted once; measuring them is not in it."""
        return f"{sum(item.cost.device_hours for item in self._trained(names).values()):.1f}"

    # --- looking up -----------------------------------------------------------------------------------------

    def _table(self, name: str) -> Table:
        check_choice("grid", name, self.context.tables)
        return self.context.tables[name]

    def _nfe(self, name: str) -> int:
        return self.context.grids[name].grid.layout.nfe[0]

    def _row(self, name: str, row: str) -> str:
        grid = self.context.grids[name].grid
        check_choice(f"row of {name}", row, [known.id for known in (*grid.rows, *grid.references)])
        return row

    def _column(self, table: Table, metric: str) -> int:
        known = [shown.metric for shown in table.columns]
        check_choice(f"metric of {table.name}", metric, known)
        return known.index(metric)

    def _line(self, table: Table, row: str, split: str, nfe: int) -> Line:
        """The line of a row at ``nfe``; that of a reference, which is measured at one."""
        for block, line in _lines(table, split):
            if line.row == row and (block.title == REFERENCE or line.nfe == nfe):
                return line
        raise UserError(f"{table.name}: row {row} is not shown on {split} captions at {nfe} NFE")

    def _judgements(self, names: Sequence[str]) -> list[Judgement]:
        for name in names:
            self._table(name)  # its UserError
        return [judgement for judgement in self.context.judgements if judgement.claim.grid in names]

    def _runs(self, name: str, row: str) -> list[CellRun]:
        """The finished runs of a row; UserError when there is none."""
        self._row(name, row)
        items = self.context.grids[name].items
        found = [item for item in items if item.cell.row == row and item.state == "done"]
        if not found:
            raise UserError(f"{name}: row {row} has no finished run")
        return found

    def _trained(self, names: Sequence[str]) -> Mapping[str, CellRun]:
        """By run id: the finished trainings of these grids, which may share some."""
        found = {}
        for name in names:
            for item in self.context.grids[name].items:
                if item.cell.config.method.trains and item.state == "done":
                    found[item.cell.id] = item
        return found

    def _raw(self, name: str, row: str, metric: str, split: str, nfe: int | None = None) -> dict[int, float]:
        """Shown values by seed; UserError when there is none. A reference has one NFE, its own."""
        of = self.context.grids[name]
        references = [reference.id for reference in of.grid.references]
        asked = None if row in references else nfe or self._nfe(name)
        found = values_by_seed(of, self._row(name, row), metric, split, asked)
        if not found:
            raise UserError(f"{name}: row {row} has no {metric} on {split} captions")
        factor = shown_column(of.grid, metric).factor
        return {seed: factor * value for seed, value in found.items()}


def _difference(reference: Mapping[int, float], other: Mapping[int, float]) -> Estimate:
    """reference - other, of means; one value of the reference is known without error."""
    means = fmean(reference.values()) - fmean(other.values())
    parts = [(variance(list(values.values())) / len(values), len(values)) for values in (reference, other)]
    known = [(part, n) for part, n in parts if n > 1]
    return Estimate(means, math.sqrt(sum(part for part, _ in known)), min((n for _, n in known), default=math.inf) - 1)


def _percent(share: float) -> str:
    """A share of a gap in words where it leaves the gap: ``none``, ``84%``, ``all``."""
    if share <= 0:
        return "none"
    return "all" if share >= 1 else f"{share:.0%}"


def _narrowed(panel: Panel, nfe: Sequence[int]) -> Panel:
    """The panel without the blocks of other numbers of evaluations."""
    blocks = [b for b in panel.blocks if b.title in (REFERENCE, PUBLISHED, *(f"{n} NFE" for n in nfe))]
    return replace(panel, blocks=tuple(blocks))


def _lines(table: Table, split: str) -> list[tuple[Block, Line]]:
    """Every line of a split's panel with its block."""
    panels = [panel for panel in table.panels if panel.split == split]
    return [(block, line) for panel in panels for block in panel.blocks for line in block.lines]
