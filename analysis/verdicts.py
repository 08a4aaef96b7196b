"""Verdicts on the papers' claims, from our runs.

A contrast is the difference of two rows. Its test borrows what other runs of its kind say of the spread of seeds, and a
rule says whether it is made within seeds (``analysis.spread``). A claim is

- *reproduced*: every contrast lies on the published side, each at the two-sided 5% level;
- *contradicted*: one of m contrasts lies on the other side, at the level 5%/m, so that both happen as rarely by chance;
- *negligible*: one of m contrasts is smaller than the metric's margin, by two one-sided tests at 5%/m each, so that the
  claim as a whole holds by no more than that;
- *decided but negligible*: one of the first two, by a difference that is smaller than the margin all the same;
- *inconclusive*: nothing of it, and with fewer than ``LEAST_SEEDS`` seeds in any case.

It is judged on each split of captions apart. ``with_rates`` adds what remains when all judgements are seen together:
among those decided at a rate of 10% (Benjamini & Hochberg 1995), a tenth is wrong on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from analysis import spread
from analysis.claims import EQUAL, LEAST_SEEDS, Claim, Contrast, check_rows, load_claims
from analysis.collect import Results
from analysis.columns import Column, shown_column
from analysis.inference import LEVEL, POWER, Estimate, false_discovery_rates, paired, power, unpaired
from core.catalogue import METRICS, READINGS

REPRODUCED, CONTRADICTED, NEGLIGIBLE = "reproduced", "contradicted", "negligible"
TOO_SMALL, INCONCLUSIVE, NO_DATA = "decided but negligible", "inconclusive", "no data"
VERDICTS = (REPRODUCED, CONTRADICTED, TOO_SMALL, NEGLIGIBLE, INCONCLUSIVE, NO_DATA)
DECIDED = VERDICTS[:4]
RATE = 0.1  # of false discoveries
MOST_SEEDS = 50


@dataclass(frozen=True)
class Evidence:
    """P values: two-sided ones of what is published and of its contrary, and those of negligible differences."""

    published: float
    contrary: float
    negligible: float
    small: float  # of the difference that decides being negligible

    def verdict(self, is_decided: bool, is_negligible: bool) -> str:
        """The verdict where a difference is found or not, and found to be negligible or not."""
        if is_decided and self.small <= LEVEL:
            return TOO_SMALL
        if is_decided:
            return REPRODUCED if _known(self.published) <= _known(self.contrary) else CONTRADICTED
        return NEGLIGIBLE if is_negligible else INCONCLUSIVE

    @property
    def verdict_alone(self) -> str:
        """The verdict at the level of a single test."""
        return self.verdict(self.p <= LEVEL, self.negligible <= LEVEL)

    @property
    def p(self) -> float:
        """The p value of any difference: the smaller of both directions."""
        return min(_known(self.published), _known(self.contrary))


def _known(p: float) -> float:
    return 1.0 if math.isnan(p) else p


@dataclass(frozen=True)
class Comparison:
    """A contrast beside our difference ``row - versus`` in shown units, on one split at one NFE.

    ``estimate`` is judged; ``within_seeds`` and ``between_means`` are the plain t tests, which borrow nothing.
    """

    claim: Claim
    contrast: Contrast
    label: str
    split: str
    nfe: int
    column: Column
    seeds: int  # of the row that has fewer
    estimate: Estimate
    within_seeds: Estimate
    between_means: Estimate
    allowed: float  # the margin in shown units

    @property
    def as_published(self) -> bool:
        """Whether the mean, whatever its interval, lies where the source says."""
        mean = self.estimate.mean
        return {"lower": mean < 0, "higher": mean > 0, EQUAL: abs(mean) <= self.allowed}[self.contrast.expected]

    @property
    def evidence(self) -> Evidence:
        if self.seeds < LEAST_SEEDS:
            return Evidence(math.nan, math.nan, math.nan, math.nan)
        return self.evidence_of(self.estimate)

    def evidence_of(self, estimate: Estimate) -> Evidence:
        """The evidence of this contrast by another way of testing it."""
        within = estimate.within(self.allowed)
        if self.contrast.expected == EQUAL:
            return Evidence(within, estimate.beyond(self.allowed), math.nan, math.nan)
        below, above = (min(1.0, 2 * p) for p in (estimate.below(0.0), estimate.above(0.0)))
        sides = (below, above) if self.contrast.expected == "lower" else (above, below)
        return Evidence(*sides, within, within)

    @property
    def verdict(self) -> str:
        """The verdict (VERDICTS) on this contrast alone."""
        return self.evidence.verdict_alone if self.seeds else NO_DATA

    @property
    def at(self) -> str:
        """`` at 2 NFE``; nothing for what is read from a training's log."""
        return "" if self.contrast.metric in READINGS else f" at {self.nfe} NFE"

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds find this difference in 80 of 100 cases, if it is as large as measured and spreads as now.

        None: unknown, or more than MOST_SEEDS.
        """
        distance = abs(self.estimate.mean)
        if self.contrast.expected == EQUAL:
            distance = abs(distance - self.allowed)
        each_way = 1 if self.estimate.df == self.within_seeds.df else 2  # degrees of freedom of one more seed
        for n in range(LEAST_SEEDS, MOST_SEEDS + 1):
            error = self.estimate.error * math.sqrt(self.seeds / n)
            if power(distance, error, self.estimate.df + each_way * (n - self.seeds)) >= POWER:
                return n
        return None


@dataclass(frozen=True)
class Judgement:
    """A claim on one split of captions; ``""`` where it is about training logs alone.

    ``q`` and ``q_negligible`` are the rates of false discoveries among all judgements made together; nan: none known.
    """

    claim: Claim
    split: str
    comparisons: tuple[Comparison, ...]
    q: float = math.nan
    q_negligible: float = math.nan

    @property
    def evidence(self) -> Evidence:
        """All contrasts together: reproduced needs each of them, contradicted and negligible one."""
        found = [comparison.evidence for comparison in self.comparisons]
        against = min(found, key=lambda evidence: _known(evidence.contrary))
        published = max(_known(evidence.published) for evidence in found)
        contrary = min(1.0, len(found) * _known(against.contrary))
        negligible = min(1.0, len(found) * min(_known(evidence.negligible) for evidence in found))
        return Evidence(published, contrary, negligible, against.small if contrary < published else negligible)

    @property
    def verdict(self) -> str:
        """The verdict (VERDICTS) at the level of a single test."""
        return self.evidence.verdict_alone if self.seeds else NO_DATA

    @property
    def verdict_together(self) -> str:
        """The verdict when all judgements are seen together; needs ``with_rates``."""
        is_decided, is_negligible = self.q <= RATE, self.q_negligible <= RATE
        return self.evidence.verdict(is_decided, is_negligible) if self.seeds else NO_DATA

    @property
    def seeds(self) -> int:
        return min((comparison.seeds for comparison in self.comparisons), default=0)

    @property
    def to_decide(self) -> str:
        """The number of seeds that an inconclusive claim waits for; empty for one that is decided."""
        if self.verdict in DECIDED:
            return ""
        if self.seeds < LEAST_SEEDS:
            return f"at least {LEAST_SEEDS} seeds"
        needed = [comparison.seeds_needed for comparison in self.comparisons if comparison.verdict != REPRODUCED]
        if None in needed:
            return f"more than {MOST_SEEDS} seeds"
        return f"about {max(needed)} seeds"


def judge(of: Results, claims: Sequence[Claim] | None = None) -> list[Judgement]:
    """The claims that are made of this grid, on each of its splits; once where training logs alone decide."""
    out = []
    for claim in load_claims() if claims is None else claims:
        if claim.grid != of.grid.name:
            continue
        check_rows(claim, of.grid)
        from_logs = all(contrast.metric in READINGS for contrast in claim.contrasts)
        for split in ("",) if from_logs else of.grid.layout.splits:
            comparisons = tuple(_compare(claim, contrast, split, of) for contrast in claim.contrasts)
            out.append(Judgement(claim, split, comparisons))
    return out


def with_rates(judgements: Sequence[Judgement]) -> list[Judgement]:
    """The same judgements, with the rates of false discoveries among all of them."""
    known = [judgement.evidence if judgement.seeds >= LEAST_SEEDS else None for judgement in judgements]
    q = false_discovery_rates([math.nan if found is None else found.p for found in known])
    negligible = false_discovery_rates([math.nan if found is None else found.negligible for found in known])
    return [replace(j, q=one, q_negligible=other) for j, one, other in zip(judgements, q, negligible, strict=True)]


def _compare(claim: Claim, contrast: Contrast, split: str, of: Results) -> Comparison:
    nfe, metric = claim.nfe_in(of.grid), contrast.metric
    ours, theirs = (_values(of, claim, row, metric, split, nfe) for row in (contrast.row, contrast.versus))
    shared = ours.keys() & theirs.keys()
    labels = {row.id: row.label for row in (*of.grid.rows, *of.grid.references)}
    return Comparison(
        claim=claim,
        contrast=contrast,
        label=f"{labels[contrast.row]} − {labels[contrast.versus]}",
        split=split,
        nfe=nfe,
        column=shown_column(of.grid, metric),
        seeds=len(shared),
        estimate=spread.borrowed(of, metric, split, nfe).estimate(ours, theirs),
        within_seeds=paired([ours[seed] - theirs[seed] for seed in sorted(shared)]),
        between_means=unpaired(list(ours.values()), list(theirs.values())),
        allowed=contrast.margin * abs(fmean(theirs.values())) if theirs else math.nan,
    )


def _values(of: Results, claim: Claim, row: str, metric: str, split: str, nfe: int) -> dict[int, float]:
    """Shown values of the planned seeds; a seed that diverged has the worst value of any run of the grid."""
    found = spread.shown_values(of, row, metric, split, nfe)
    planned = [item for item in of.items if item.cell.row == row][: claim.seeds]
    worst = _worst(of, metric, split, nfe)
    values = {}
    for item in planned:
        value = worst if item.state == "diverged" else found.get(item.cell.seed, math.nan)
        if not math.isnan(value):
            values[item.cell.seed] = value
    return values


def _worst(of: Results, metric: str, split: str, nfe: int) -> float:
    """The worst value that any run of the grid has; nan where no direction of the metric is better."""
    values = [value for row in of.grid.rows for value in spread.shown_values(of, row.id, metric, split, nfe).values()]
    better = {**METRICS, **READINGS}[metric].better
    if not values or not better:
        return math.nan
    return max(values) if better == "min" else min(values)


def counts(judgements: Sequence[Judgement], together: bool = False) -> dict[str, int]:
    """How many judgements have each verdict, alone or when all are seen together."""
    found = [judgement.verdict_together if together else judgement.verdict for judgement in judgements]
    return {verdict: found.count(verdict) for verdict in VERDICTS if verdict in found}
