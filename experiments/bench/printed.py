"""The measured table as lines of text, from what the committed file holds. Torch-free: pages use it too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.bench.rows import RATIO, Row

SIGNS = {True: "", False: "  not reached"}


def row_of(found: Mapping[str, Any]) -> Row:
    """The row that a measurement is of, as it was when it was measured."""
    return Row(found["name"], found["work"], found["wanted"], found["kind"])


def with_spread(values: Mapping[str, float], unit: str = "") -> str:
    """Median and, in brackets, lowest and highest: ``2.03 (1.98-2.11)``."""
    return f"{values['median']:.3g}{unit} ({values['low']:.3g}-{values['high']:.3g})"


def wanted(row: Row) -> str:
    """The value that is wanted: ``>= 3``, ``< 2 s``."""
    return f">= {row.wanted:g}" if row.kind == RATIO else f"< {row.wanted:g} s"


def evaluations(found: Mapping[str, Any]) -> str:
    """Images/s and evaluations an image of one side: ``1.2 images/s; student 2, teacher 44``."""
    counts = found["evaluations_per_image"]
    named = ", ".join(f"{role} {count:.3g}" for role, count in counts.items())
    return f"{found['images_per_s']:.3g} images/s; evaluations an image: {named}"


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """One measured row: value, spread, what is wanted, and the work of both sides."""
    row = row_of(found)
    values, unit = (found["ratio"], "") if row.kind == RATIO else (found["seconds"], " s")
    reached = SIGNS[row.reached(values["median"])]
    yield f"{row.name:<16}{with_spread(values, unit):<24}wanted {wanted(row)}{reached}    {row.work}"
    if "efficiency" in found:
        yield f"{'':<16}efficiency {with_spread(found['efficiency'])}"
    for side in ("ours", "reference"):
        if side in found:
            yield f"{'':<16}{side:<11}{evaluations(found[side])}"
