"""How far seeds of one kind scatter: what a test of three seeds may borrow from all the other runs.

A kind is a base experiment (``flash/emoji``), a metric, a split and a number of evaluations. ``spread.csv`` holds what
the committed records say of each; ``fewstep results --pages`` writes it anew. Runs of another scale or budget have no
kind there, and are judged by their own seeds alone.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from statistics import fmean

from ablations.grid import Grid
from analysis import training
from analysis.collect import Results, values_by_seed
from analysis.columns import shown_column
from analysis.inference import NOTHING_KNOWN, Estimate, Prior, fit_prior, paired, t_quantile, unpaired, variance
from core.catalogue import READINGS

FILE = Path(__file__).parent / "spread.csv"
SCALE, BUDGET = "emoji", "full"
MOST_CORRELATION = 0.95
Seeds = Mapping[int, float]


@dataclass(frozen=True)
class Kind:
    """Numbers whose seeds scatter alike; a reading of training logs has no split and no NFE."""

    base: str
    metric: str
    split: str
    nfe: int


@dataclass(frozen=True)
class Spread:
    """The prior of a row's variance in shown units, of ``rows`` rows, and how much two rows have in common by seed."""

    rows: int = 0
    variance: float = math.nan
    df: float = 0.0
    correlation: float = 0.0

    @property
    def of_rows(self) -> Prior:
        return Prior(self.variance, self.df) if self.df else NOTHING_KNOWN

    @property
    def of_differences(self) -> Prior:
        """The prior of the variance of two rows' differences within seeds."""
        return Prior(2 * self.variance * (1 - self.correlation), self.df) if self.df else NOTHING_KNOWN

    def pairs_by_seed(self, n: int) -> bool:
        """Whether the difference of two rows of ``n`` seeds is better known within seeds: a rule, not a result.

        Pairing halves the degrees of freedom, and takes out what seeds have in common. Where nothing is known of this
        kind, cells of one seed are paired, since they draw the same data, noise and teacher problems.
        """
        if n < 2 or not self.df:
            return True
        within, between = (self.expected_half_width(n, by_pairs) for by_pairs in (True, False))
        return within <= between

    def expected_half_width(self, n: int, by_pairs: bool) -> float:
        """Half the width of a 95% interval of a difference of ``n`` seeds whose variance is the common one."""
        error, df = self.expected_error(n, by_pairs)
        return t_quantile(0.975, df) * error

    def expected_error(self, n: int, by_pairs: bool) -> tuple[float, float]:
        """The standard error of such a difference and its degrees of freedom."""
        prior, own_df = (self.of_differences, n - 1) if by_pairs else (self.of_rows, 2 * (n - 1))
        return math.sqrt(prior.variance * (1 if by_pairs else 2) / n), prior.df + own_df

    def estimate(self, ours: Seeds, theirs: Seeds) -> Estimate:
        """The difference ``ours - theirs``, within seeds or of the means as the rule says."""
        shared = sorted(ours.keys() & theirs.keys())
        if not self.pairs_by_seed(len(shared)):
            return unpaired(list(ours.values()), list(theirs.values()), self.of_rows)
        return paired([ours[seed] - theirs[seed] for seed in shared], self.of_differences)


UNKNOWN = Spread()


def borrowed(of: Results, metric: str, split: str, nfe: int) -> Spread:
    """The known spread of a metric of a grid; nothing is, at another scale or budget than ``spread.csv``'s."""
    is_known = (of.scale, of.budget) == (SCALE, BUDGET)
    return load().get(kind_of(of.grid, metric, split, nfe), UNKNOWN) if is_known else UNKNOWN


def kind_of(grid: Grid, metric: str, split: str, nfe: int) -> Kind:
    """The kind of a metric of a grid at ``SCALE``."""
    return Kind(grid.base[SCALE], metric, "", 0) if metric in READINGS else Kind(grid.base[SCALE], metric, split, nfe)


def shown_values(of: Results, row: str, metric: str, split: str, nfe: int) -> dict[int, float]:
    """Values of one row in shown units by seed; of a reading of training logs, whatever split and NFE."""
    if metric in READINGS:
        found = training.by_seed(of.items, row, metric)
    else:
        found = values_by_seed(of, row, metric, split, nfe)
    factor = shown_column(of.grid, metric).factor
    return {seed: factor * value for seed, value in found.items()}


def measure(grids: Iterable[Results], readings: Mapping[str, Sequence[str]]) -> dict[Kind, Spread]:
    """The spread of every kind that these grids show; ``readings``: the readings of logs that each grid needs."""
    rows: dict[Kind, dict[tuple[str, ...], Seeds]] = {}
    pairs: dict[Kind, list[tuple[Seeds, Seeds]]] = {}
    for of in grids:
        for asked in _asked(of, readings.get(of.grid.name, ())):
            found = {
                _runs(of, row.id): shown_values(of, row.id, asked.metric, asked.split, asked.nfe)
                for row in of.grid.rows
            }
            rows.setdefault(asked, {}).update(found)
            first, *others = found.values()
            pairs.setdefault(asked, []).extend((first, other) for other in others)
    return {asked: spread_of(list(known.values()), pairs[asked]) for asked, known in rows.items()}


def _asked(of: Results, readings: Sequence[str]) -> Iterator[Kind]:
    """Every kind of number in the grid's table, and of the readings."""
    layout = of.grid.layout
    for metric, split, nfe in itertools.product(of.grid.metrics, layout.splits, layout.nfe):
        yield kind_of(of.grid, metric, split, nfe)
    for metric in readings:
        yield kind_of(of.grid, metric, "", 0)


def _runs(of: Results, row: str) -> tuple[str, ...]:
    """The runs of a row: grids share some, and count them once."""
    return tuple(sorted(item.cell.id for item in of.items if item.cell.row == row))


def spread_of(rows: Sequence[Seeds], pairs: Sequence[tuple[Seeds, Seeds]]) -> Spread:
    """The spread that rows show by themselves, and pairs of rows by what their seeds have in common."""
    many = [list(seeds.values()) for seeds in rows if len(seeds) > 1]
    prior = fit_prior([variance(values) for values in many], [len(values) - 1 for values in many])
    return Spread(len(many), prior.variance, prior.df, _correlation(pairs))


def _correlation(pairs: Sequence[tuple[Seeds, Seeds]]) -> float:
    """One less the mean variance of differences within seeds, as a part of both rows' own variances; 0 if unknown.

    Each pair counts alike, whatever its variance.
    """
    parts = []
    for one, other in pairs:
        shared = sorted(one.keys() & other.keys())
        if len(shared) < 2:
            continue
        own = sum(variance([seeds[seed] for seed in shared]) for seeds in (one, other))
        if own:
            parts.append(variance([one[seed] - other[seed] for seed in shared]) / own)
    return min(1 - fmean(parts), MOST_CORRELATION) if parts else 0.0


def to_csv(spreads: Mapping[Kind, Spread]) -> str:
    """``spread.csv``: one line for each kind of which something is known."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for record in (Kind, Spread) for field in fields(record)])
    for asked in sorted(spreads, key=astuple):
        if spreads[asked].df:
            writer.writerow([*astuple(asked), *(_text(value) for value in astuple(spreads[asked]))])
    return out.getvalue()


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"


@cache
def load(file: Path = FILE) -> Mapping[Kind, Spread]:
    """The kinds of ``spread.csv``."""
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        return dict(map(_read, csv.DictReader(lines)))


def _read(line: Mapping[str, str]) -> tuple[Kind, Spread]:
    asked = Kind(line["base"], line["metric"], line["split"], int(line["nfe"]))
    return asked, Spread(int(line["rows"]), *(float(line[name]) for name in ("variance", "df", "correlation")))
