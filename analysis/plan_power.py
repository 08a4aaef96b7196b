"""``fewstep plan-power GRID``: how many seeds decide what, from the spread of runs that are already there.

For each metric and split at the number of evaluations at which the grid is judged: the spread of its kind
(``analysis.spread``), the difference that n seeds find in 80 of 100 cases, and for each claim the seeds that find a
difference of its margin, beside those that are planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from ablations.grid import Grid
from analysis.claims import LEAST_SEEDS, Claim, Contrast, load_claims
from analysis.collect import Results
from analysis.columns import shown_column
from analysis.inference import POWER, average_power
from analysis.spread import Kind, Spread, kind_of, load, shown_values
from core.catalogue import READINGS
from core.splits import captions

SEEDS = (3, 4, 6, 8, 12, 16)
MOST_SEEDS = 200


def chance(spread: Spread, effect: float, n: int) -> float:
    """The probability that ``n`` seeds of each row find a difference of ``effect``, in shown units."""
    by_pairs = spread.pairs_by_seed(n)
    prior = spread.of_differences if by_pairs else spread.of_rows
    return average_power(effect, prior, (n - 1) * (1 if by_pairs else 2), n if by_pairs else n / 2)


def detectable(spread: Spread, n: int) -> float:
    """The difference that ``n`` seeds find in 80 of 100 cases, in shown units."""
    from scipy.optimize import brentq

    largest = 100 * math.sqrt(spread.variance)
    return float(brentq(lambda effect: chance(spread, effect, n) - POWER, 0.0, largest))


def seeds_for(spread: Spread, effect: float) -> int | None:
    """The fewest seeds that find ``effect`` in 80 of 100 cases; None: more than MOST_SEEDS."""
    counts = range(LEAST_SEEDS, MOST_SEEDS + 1)
    return next((n for n in counts if chance(spread, effect, n) >= POWER), None)


def markdown(of: Results, spreads: Mapping[Kind, Spread] | None = None) -> str:
    """The plan of a grid as Markdown: what its metrics resolve, and what its claims need."""
    known = load() if spreads is None else spreads
    lines = ["| Quantity | Captions | NFE | Mean | sd of a seed | Correlation | " + " | ".join(map(_at, SEEDS)) + " |"]
    lines.append("|" + " --- |" * (6 + len(SEEDS)))
    lines += [_line(of, asked, known[asked]) for asked in _kinds(of.grid) if asked in known]
    claims = [claim for claim in load_claims() if claim.grid == of.grid.name]
    parts = ["Differences that so many seeds find in 80 of 100 cases, in percent of the mean:", "\n".join(lines)]
    if claims:
        parts += ["Seeds that find a difference of the margin:", "\n".join(_claims(of, claims, known))]
    return "\n\n".join(parts) + "\n"


def _at(seeds: int) -> str:
    return f"{seeds} seeds"


def _kinds(grid: Grid) -> Iterator[Kind]:
    for metric in grid.metrics:
        for split in grid.layout.splits:
            for nfe in grid.layout.nfe:
                yield kind_of(grid, metric, split, nfe)


def _mean(of: Results, asked: Kind) -> float:
    """The mean of all seeds and rows, in shown units; nan while nothing is measured."""
    split, nfe = asked.split or of.grid.layout.splits[0], asked.nfe or of.grid.layout.nfe[0]
    found = [value for row in of.grid.rows for value in shown_values(of, row.id, asked.metric, split, nfe).values()]
    return fmean(found) if found else math.nan


def _line(of: Results, asked: Kind, spread: Spread) -> str:
    mean = _mean(of, asked)
    effects = [f"{detectable(spread, n) / abs(mean):.1%}" if mean else "" for n in SEEDS]
    heading = shown_column(of.grid, asked.metric).heading
    cells = [heading, captions(asked.split).removesuffix(" captions"), str(asked.nfe), f"{mean:.3g}"]
    cells += [f"{math.sqrt(spread.variance):.2g}", f"{spread.correlation:.2f}", *effects]
    return "| " + " | ".join(cells) + " |"


def _claims(of: Results, claims: Sequence[Claim], known: Mapping[Kind, Spread]) -> Iterator[str]:
    yield "| Claim | Quantity | Captions | Margin | Seeds planned | Seeds that find the margin |"
    yield "|" + " --- |" * 6
    for claim in claims:
        for contrast in claim.contrasts:
            splits = ("",) if contrast.metric in READINGS else of.grid.layout.splits
            yield from (_claim_line(of, claim, contrast, split, known) for split in splits)


def _claim_line(of: Results, claim: Claim, contrast: Contrast, split: str, known: Mapping[Kind, Spread]) -> str:
    asked = kind_of(of.grid, contrast.metric, split, claim.nfe_in(of.grid))
    name = shown_column(of.grid, contrast.metric).label
    where = captions(split).removesuffix(" captions") if split else "any"
    needed = _needed(known.get(asked), contrast.margin * abs(_mean(of, asked)))
    return f"| {claim.claim} | {name} | {where} | {contrast.margin:.0%} | {claim.seeds} | {needed} |"


def _needed(spread: Spread | None, effect: float) -> str:
    """How many seeds find ``effect``, in words."""
    if spread is None or math.isnan(effect):
        return "unknown"
    return str(seeds_for(spread, effect) or f"more than {MOST_SEEDS}")
