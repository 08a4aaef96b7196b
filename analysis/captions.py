"""Captions that say what the numbers of a table or figure are: scale, budget, seeds, N, judges and protocol ids."""

from __future__ import annotations

import pandas as pd

from analysis.columns import Column, superscript
from core.splits import captions


def notes(frame: pd.DataFrame, columns: tuple[Column, ...]) -> tuple[str, ...]:
    """Sentences for the caption of a table or figure made from a ``comparable`` frame."""
    counted = frame[frame["value"].notna()]
    if counted.empty:
        return ("No run has been evaluated yet.",)
    return (
        f"{scale_name(frame)} scale, {frame['budget'].iat[0]} budget{_images(counted)}.",
        _seeds(counted),
        *(_metric(counted[counted["metric"] == c.metric], c) for c in columns if (counted["metric"] == c.metric).any()),
    )


def scale_name(frame: pd.DataFrame) -> str:
    return str(frame["scale"].iat[0]).capitalize()


def _images(counted: pd.DataFrame) -> str:
    """The training budget of the students, in images."""
    sizes = sorted({int(n) for n in counted.loc[~counted["reference"], "images"]})
    return f" ({' or '.join(f'{n:,}' for n in sizes)} training images for each student)" if sizes else ""


def _seeds(counted: pd.DataFrame) -> str:
    students = counted[~counted["reference"]]
    counts = students.groupby(["row", "metric", "split", "steps"])["seed"].nunique()
    most = int(counts.max()) if len(counts) else 1
    shared = "all rows sample the same prompts from the same noise."
    if most < 2:
        return f"One training seed: no spread is shown; {shared}"
    return f"Mean ± standard deviation over {most} training seeds; {shared}"


def _metric(part: pd.DataFrame, column: Column) -> str:
    """``KID: ..., N = 2,000 images against 10,000 real; protocol 1a2b3c4d (training captions), ...``."""
    fields = part["fields"].iat[0]
    sizes = " / ".join(f"{int(n):,}" for n in sorted(part["n"].unique()))
    real = f" against {fields['num_reference']:,} real" if fields.get("num_reference") else ""
    factor = f", shown {superscript(column.power)}" if column.power else ""
    known = dict.fromkeys(zip(part["split"], part["comparable"], strict=True))
    protocols = ", ".join(f"{protocol} ({captions(split)})" for split, protocol in known)
    meaning = f"{column.meaning}, " if column.meaning else ""
    judged = f"{column.label}: {meaning}judge {fields['judge']}{factor}"
    return f"{judged}, N = {sizes} images{real}; protocol {protocols}."
