"""The measured table as lines of text, from what the committed file holds. Torch-free: pages use it too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.bench.rows import RATIO, SPEED, Row

SIGNS = {True: "", False: "  not reached"}


def row_of(found: Mapping[str, Any]) -> Row:
    """The row that a measurement is of, as it was when it was measured."""
    return Row(found["name"], found["work"], found["wanted"], found["kind"])


def with_spread(values: Mapping[str, float], unit: str = "") -> str:
    """Median and, in brackets, lowest and highest: ``2.03 (1.98-2.11)``."""
    return f"{values['median']:.3g}{unit} ({values['low']:.3g}-{values['high']:.3g})"


def wanted(row: Row) -> str:
    """The value that is wanted: ``>= 3``, ``< 2 s``; empty where none is."""
    if row.wanted is None:
        return ""
    return f">= {row.wanted:g}" if row.kind == RATIO else f"< {row.wanted:g} s"


def evaluations(found: Mapping[str, Any]) -> str:
    """Images/s and evaluations an image of one side: ``1.2 images/s; student 2, teacher 44``."""
    counts = found["evaluations_per_image"]
    named = ", ".join(f"{role} {count:.3g}" for role, count in counts.items())
    return f"{found['images_per_s']:.3g} images/s; evaluations an image: {named}"


def parts(time: Mapping[str, float]) -> str:
    """Shares of a time, the largest first: ``teacher 71%, student, with gradient 12%``."""
    ordered = sorted(time.items(), key=lambda item: -item[1])
    return "; ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.005)


def value_of(found: Mapping[str, Any]) -> Mapping[str, float]:
    """The measured value of a row, a ratio or seconds, with its spread."""
    return found["ratio"] if found["kind"] == RATIO else found["seconds"]


def on_gpu(found: Mapping[str, Any]) -> str:
    """Numbers of a GPU: ``312 TFLOP/s, MFU 32%, peak 41 GB``; empty where none has measured."""
    if "peak_gb" not in found:
        return ""
    share = "unknown" if found["mfu"] is None else f"{found['mfu']:.0%}"
    return f"{found['tflops']:.3g} TFLOP/s, MFU {share}, peak {found['peak_gb']:.3g} GB"


def block_details(found: Mapping[str, Any]) -> Iterator[str]:
    """Both blocks of a FLUX.2, without and with a backward pass."""
    for kind in ("double", "single"):
        for use in ("forward", "training"):
            one = found[kind][use]
            yield f"{kind} {use:<9}{one['images_per_s']:.3g} images/s; {on_gpu(one)}"


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """One measured row: value, spread, what is wanted, and the work of both sides."""
    row = row_of(found)
    if row.kind == SPEED:
        yield f"{row.name:<16}{row.work}"
        yield from (f"{'':<16}{detail}" for detail in block_details(found))
        return
    values = value_of(found)
    reached = SIGNS[row.reached(values["median"])]
    unit = "" if row.kind == RATIO else " s"
    yield f"{row.name:<16}{with_spread(values, unit):<24}wanted {wanted(row)}{reached}    {row.work}"
    if "efficiency" in found:
        yield f"{'':<16}efficiency {with_spread(found['efficiency'])}"
    if "time" in found:
        yield f"{'':<16}time       {parts(found['time'])}"
    for side in ("ours", "reference"):
        if side in found:
            yield f"{'':<16}{side:<11}{evaluations(found[side])}"
    if "peak_gb" in found:
        yield f"{'':<16}gpu        {on_gpu(found)}"
