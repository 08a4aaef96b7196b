"""The papers' qualitative claims (claims.yaml), each an inequality between rows of a grid, judged from our runs.

A contrast is judged by the seed-paired difference of its two rows: the same seed has the same data, noise and teacher
problems in both. It is *reproduced* when the 95% t interval lies on the published side, *contradicted* when it lies on
the other one, *inconclusive* otherwise, and from fewer than LEAST_SEEDS in any case. A claim is reproduced when all of
its contrasts are, and contradicted when one of them is; on each split of captions apart. No correction is made for the
number of contrasts: of twenty without an effect, one will be decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ablations.grid import Grid
from analysis import training
from analysis.collect import Results, values_by_seed
from analysis.columns import Column, shown_column
from analysis.stats import Summary, paired_difference, seeds_to_decide, summarize
from core.catalogue import METRICS, READINGS
from core.schema import UserError, check_choice

FILE = Path(__file__).parent / "claims.yaml"
EXPECTED = ("lower", "higher", "equal")
MOST_SEEDS = 50
DECIDED = ("reproduced", "contradicted")
LEAST_SEEDS = 3  # the interval of two is right in 95 of 100 cases too, but its width says next to nothing


@dataclass(frozen=True)
class Contrast:
    """metric(row) is ``lower`` or ``higher`` than metric(versus), or ``equal`` within ``margin`` times the latter."""

    row: str
    versus: str
    metric: str
    expected: str
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper; its contrasts are judged at the grid's first NFE, the one that the source reports."""

    id: str
    claim: str
    source: str
    grid: str
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Comparison:
    """A contrast beside our seed-paired difference ``row - versus`` in shown units, on one split at one NFE."""

    claim: Claim
    contrast: Contrast
    label: str
    split: str
    nfe: int
    column: Column
    difference: Summary
    allowed: float = 0.0  # of ``equal``: how far from zero, in shown units

    @property
    def as_published(self) -> bool:
        """Whether the mean, whatever its interval, lies where the source says."""
        mean = self.difference.mean
        return {"lower": mean < 0, "higher": mean > 0, "equal": abs(mean) <= self.allowed}[self.contrast.expected]

    @property
    def verdict(self) -> str:
        """reproduced | contradicted | inconclusive | no data."""
        if self.difference.n == 0:
            return "no data"
        if self.difference.n < LEAST_SEEDS or not self.difference.half_width < self._distance():
            return "inconclusive"
        return "reproduced" if self.as_published else "contradicted"

    @property
    def at(self) -> str:
        """`` at 2 NFE``; nothing for what is read from a training's log."""
        return "" if self.contrast.metric in READINGS else f" at {self.nfe} NFE"

    def _distance(self) -> float:
        """The distance of the mean from the nearest value that would change the verdict."""
        return abs(abs(self.difference.mean) - self.allowed)

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds would decide if mean and spread stayed as they are; None: unknown, or more than MOST_SEEDS."""
        return seeds_to_decide(self.difference.sd, self._distance(), MOST_SEEDS, LEAST_SEEDS)


@dataclass(frozen=True)
class Judgement:
    """A claim on one split of captions; ``""`` where it is about training logs alone."""

    claim: Claim
    split: str
    comparisons: tuple[Comparison, ...]

    @property
    def verdict(self) -> str:
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if "contradicted" in verdicts:
            return "contradicted"
        if verdicts == {"reproduced"}:
            return "reproduced"
        return "no data" if verdicts <= {"no data"} else "inconclusive"

    @property
    def seeds(self) -> int:
        return min((comparison.difference.n for comparison in self.comparisons), default=0)

    @property
    def to_decide(self) -> str:
        """The number of seeds that an inconclusive claim waits for; empty for one that is decided."""
        if self.verdict in DECIDED:
            return ""
        undecided = [comparison for comparison in self.comparisons if comparison.verdict not in DECIDED]
        fewest = min((comparison.difference.n for comparison in undecided), default=LEAST_SEEDS)
        if fewest < LEAST_SEEDS:
            return f"at least {LEAST_SEEDS} seeds"
        needed = [comparison.seeds_needed for comparison in undecided]
        if None in needed:
            return f"more than {MOST_SEEDS} seeds"
        return f"about {max(needed, default=0)} seeds"


def load_claims(file: Path | None = None) -> tuple[Claim, ...]:
    """All claims of ``file`` (claims.yaml), checked; UserError names the claim and the field."""
    return _load(file or FILE)


@cache
def _load(file: Path) -> tuple[Claim, ...]:
    claims = []
    for entry in yaml.safe_load(file.read_text()):
        try:
            contrasts = tuple(Contrast(**contrast) for contrast in entry["contrasts"])
            claim = Claim(**{**entry, "contrasts": contrasts})
        except (TypeError, KeyError) as error:
            raise UserError(f"{file.name}: claim {entry.get('id', '?')}: {error}") from None
        for contrast in contrasts:
            check_choice(f"{file.name}: {claim.id}: expected", contrast.expected, EXPECTED)
            check_choice(f"{file.name}: {claim.id}: metric", contrast.metric, (*METRICS, *READINGS))
        claims.append(claim)
    return tuple(claims)


def judge(of: Results, claims: Sequence[Claim] | None = None) -> list[Judgement]:
    """The claims that are made of this grid, on each of its splits; once where training logs alone decide."""
    out = []
    for claim in load_claims() if claims is None else claims:
        if claim.grid != of.grid.name:
            continue
        _check_rows(claim, of.grid)
        from_logs = all(contrast.metric in READINGS for contrast in claim.contrasts)
        for split in ("",) if from_logs else of.grid.layout.splits:
            comparisons = tuple(_compare(claim, contrast, split, of) for contrast in claim.contrasts)
            out.append(Judgement(claim, split, comparisons))
    return out


def _check_rows(claim: Claim, grid: Grid) -> None:
    rows = [row.id for row in (*grid.rows, *grid.references)]
    for contrast in claim.contrasts:
        for row in (contrast.row, contrast.versus):
            check_choice(f"{FILE.name}: {claim.id}: row of {grid.name}", row, rows)
        if contrast.metric not in (*grid.metrics, *READINGS):
            raise UserError(f"{FILE.name}: {claim.id}: {contrast.metric} is not among the metrics of {grid.name}")


def _compare(claim: Claim, contrast: Contrast, split: str, of: Results) -> Comparison:
    nfe, column = of.grid.layout.nfe[0], shown_column(of.grid, contrast.metric)
    if contrast.metric in READINGS:
        values = [training.by_seed(of.items, row, contrast.metric) for row in (contrast.row, contrast.versus)]
    else:
        values = [values_by_seed(of, row, contrast.metric, split, nfe) for row in (contrast.row, contrast.versus)]
    ours, theirs = ({seed: column.factor * value for seed, value in found.items()} for found in values)
    labels = {row.id: row.label for row in (*of.grid.rows, *of.grid.references)}
    return Comparison(
        claim=claim,
        contrast=contrast,
        label=f"{labels[contrast.row]} − {labels[contrast.versus]}",
        split=split,
        nfe=nfe,
        column=column,
        difference=paired_difference(ours, theirs),
        allowed=contrast.margin * abs(summarize(list(theirs.values())).mean) if contrast.margin else 0.0,
    )


def counts(judgements: Sequence[Judgement]) -> dict[str, int]:
    """How many judgements have each verdict."""
    verdicts = ("reproduced", "contradicted", "inconclusive", "no data")
    found = [judgement.verdict for judgement in judgements]
    return {verdict: found.count(verdict) for verdict in verdicts if verdict in found}
