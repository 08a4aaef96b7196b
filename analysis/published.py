"""Published numbers (published.csv), which are never ours: they keep their own column, with their scale above it.

Metrics are named as in the catalogue, values are written as tables show them (``Column.factor`` times the raw ones).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from ablations.grid import Grid
from analysis import manifest
from analysis.columns import column

FILE = Path(__file__).parent / "published.csv"


@dataclass(frozen=True)
class Published:
    """Published numbers of one artefact: ``numbers[(row, nfe)]`` has one text for each heading."""

    headings: tuple[str, ...]
    numbers: Mapping[tuple[str, int | None], tuple[str, ...]]

    def of(self, label: str, nfe: int | None) -> tuple[str, ...]:
        """The texts beside one line; empty ones where the source gives no number. Costs hold at every NFE."""
        nothing = ("",) * len(self.headings)
        here, always = self.numbers.get((label, nfe), nothing), self.numbers.get((label, None), nothing)
        return tuple(one or other for one, other in zip(here, always, strict=True))

    def beyond(self, known: Collection[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        """Published rows at an NFE that are none of ``known`` (label, nfe), in the source's order."""
        return [key for key in self.numbers if key[1] is not None and key not in known]


@cache
def _table() -> pd.DataFrame:
    manifest.check(FILE)
    return pd.read_csv(FILE, dtype={"nfe": "Int64", "value": str})


def published_numbers(grid: Grid, scale: str) -> Published:
    """Numbers of the grid's published artefact, at the paper's scale alone."""
    if scale != "paper" or not grid.published:
        return Published((), {})
    table = _table()
    paper = re.sub(r"\W+", "_", grid.source.partition(",")[0].lower())  # "Flash Diffusion, Table 1": flash_diffusion
    table = table[(table["source"] == paper) & (table["artefact"] == grid.published)]
    metrics = list(dict.fromkeys(zip(table["metric"], table["scale"], strict=True)))
    numbers = {}
    for (row, nfe), part in table.groupby(["row", "nfe"], dropna=False, sort=False):
        found = {(m, s): v for m, s, v in zip(part["metric"], part["scale"], part["value"], strict=True)}
        numbers[row, None if pd.isna(nfe) else int(nfe)] = tuple(found.get(key, "") for key in metrics)
    return Published(tuple(f"published {column(metric).label} ({scale})" for metric, scale in metrics), numbers)
