"""The papers' qualitative claims (claims.yaml), each an inequality between rows of a grid.

What is fixed before the runs stands with each claim: its metric, how many seeds, and the margin below which a
difference is negligible (one for all claims about a metric). A later change is a new claim. ``analysis.verdicts``
judges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ablations.grid import Grid
from core.catalogue import METRICS, READINGS
from core.schema import UserError, check_choice

FILE = Path(__file__).parent / "claims.yaml"
EQUAL = "equal"
EXPECTED = ("lower", "higher", EQUAL)
LEAST_SEEDS = 3  # the interval of two is right in 95 of 100 cases too, but its width says next to nothing


@dataclass(frozen=True)
class Contrast:
    """metric(row) is ``lower`` or ``higher`` than metric(versus), or ``equal``: within ``margin`` times the latter.

    Of ``lower`` and ``higher``, ``margin`` is the metric's: a difference inside of it is negligible.
    """

    row: str
    versus: str
    metric: str
    expected: str
    margin: float


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, judged on the first ``seeds`` seeds of its grid.

    ``nfe`` is the number of evaluations of a sample at which it is judged; None: the grid's first, which the source
    reports.
    """

    id: str
    claim: str
    source: str
    grid: str
    seeds: int
    contrasts: tuple[Contrast, ...]
    nfe: int | None = None

    def nfe_in(self, grid: Grid) -> int:
        """The number of evaluations at which the claim is judged in its grid."""
        return grid.layout.nfe[0] if self.nfe is None else self.nfe


def load_claims(file: Path | None = None) -> tuple[Claim, ...]:
    """All claims of ``file`` (claims.yaml), checked; UserError names the claim and the field."""
    return _load(file or FILE)


@cache
def _load(file: Path) -> tuple[Claim, ...]:
    entries = yaml.safe_load(file.read_text())
    margins = entries["margins"]
    for metric in margins:
        check_choice(f"{file.name}: margins: metric", metric, (*METRICS, *READINGS))
    return tuple(_claim(file.name, entry, margins) for entry in entries["claims"])


def _claim(file: str, entry: Mapping[str, Any], margins: Mapping[str, float]) -> Claim:
    name = f"{file}: claim {entry.get('id', '?')}"
    try:
        contrasts = tuple(_contrast(name, contrast, margins) for contrast in entry["contrasts"])
        claim = Claim(**{**entry, "contrasts": contrasts})
    except (TypeError, KeyError) as error:
        raise UserError(f"{name}: {error}") from None
    if claim.seeds < LEAST_SEEDS:
        raise UserError(f"{name}: seeds={claim.seeds}: fewer than {LEAST_SEEDS} decide nothing")
    return claim


def _contrast(claim: str, entry: Mapping[str, Any], margins: Mapping[str, float]) -> Contrast:
    check_choice(f"{claim}: expected", entry["expected"], EXPECTED)
    check_choice(f"{claim}: metric", entry["metric"], (*METRICS, *READINGS))
    if "margin" in entry and entry["expected"] != EQUAL:
        raise UserError(f"{claim}: only expected=equal has a margin of its own; others have the metric's, of `margins`")
    if entry["metric"] not in margins and "margin" not in entry:
        raise UserError(f"{claim}: {entry['metric']} has no margin in `margins`")
    return Contrast(**{"margin": margins.get(entry["metric"]), **entry})


def check_rows(claim: Claim, grid: Grid) -> None:
    """UserError for a row, a metric or a number of evaluations that the claim's grid does not have."""
    rows = [row.id for row in (*grid.rows, *grid.references)]
    if claim.nfe_in(grid) not in grid.layout.nfe:
        raise UserError(f"{FILE.name}: {claim.id}: nfe={claim.nfe} is none of {grid.name}'s: {grid.layout.nfe}")
    for contrast in claim.contrasts:
        for row in (contrast.row, contrast.versus):
            check_choice(f"{FILE.name}: {claim.id}: row of {grid.name}", row, rows)
        if contrast.metric not in (*grid.metrics, *READINGS):
            raise UserError(f"{FILE.name}: {claim.id}: {contrast.metric} is not among the metrics of {grid.name}")
