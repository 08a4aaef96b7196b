"""A thousand real run folders: every cell of a grid of learning rates and seeds, finished as a committed record is.

What costs a command its time is real: each folder has the configuration of its own cell as the project writes it, and
the attempt, the curve, the measurements and the provenance of a run that was trained, under its own id.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import yaml

from core.config import ExperimentConfig, compose, resolve, run_id, to_yaml
from core.provenance import ROOT

EXPERIMENT, RECORD = "flash/emoji", "157e67d615"
RECORDS = ROOT / "analysis" / "records" / "runs"
RATES, SEEDS = 40, 25
MARKS = (97531.25, 864209753, "label-of-a-cell")  # stand for rate, seed and label in a text
BEAT = {"time": 1764000000.0, "pid": 4242, "host": "benchmark", "images": 8960, "images_per_s": 75.7, "eta_s": 0}


def write_grid(folder: Path, rates: int = RATES, seeds: int = SEEDS) -> Path:
    """The grid's file; its runs lie in ``folder/runs`` once ``write_runs`` has made them."""
    file = folder / "rates.yaml"
    values = {
        "title": "Learning rates",
        "base": {"emoji": EXPERIMENT},
        "seeds": list(range(seeds)),
        "axes": {"rate": {"method.student_lr": learning_rates(rates)}},
        "metrics": [*compose(EXPERIMENT).eval.metrics],
        "evaluate": {"steps": [1, 2, 4]},
        "layout": {"nfe": [2, 1, 4], "splits": ["train", "heldout"]},
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def learning_rates(count: int) -> list[float]:
    """Different rates around that of the experiment."""
    return [round(1e-4 * (index + 1), 6) for index in range(count)]


def write_runs(folder: Path, rates: int = RATES, seeds: int = SEEDS) -> Path:
    """Write a finished run of each cell below ``folder/runs``, and return that folder."""
    config = resolve(compose(EXPERIMENT))
    text, record = _text_with_marks(config), _read_record(RECORDS / RECORD)
    for rate, seed in product(learning_rates(rates), range(seeds)):
        config.method.student_lr, config.seed = rate, seed
        label, identity = f"rate-{rate:g}-s{seed}", run_id(config)
        target = folder / "runs" / config.name / f"{label}-{identity}"
        (target / "attempts").mkdir(parents=True)
        (target / "config.yaml").write_text(_filled(text, rate, seed, label))
        (target / "heartbeat.json").write_text(json.dumps(BEAT) + "\n")
        for name, content in record.items():
            (target / name).write_text(content.replace(RECORD, identity))
    return folder / "runs"


def _text_with_marks(config: ExperimentConfig) -> str:
    """The configuration as the project writes it, once: a thousand times that takes minutes."""
    marked = copy.deepcopy(config)
    marked.method.student_lr, marked.seed, marked.execution.label = MARKS
    return to_yaml(marked)


def _filled(text: str, *values: object) -> str:
    """The text with a cell's own values, which YAML writes as Python does."""
    for mark, value in zip(MARKS, values, strict=True):
        text = text.replace(f": {mark}\n", f": {value}\n")
    return text


def _read_record(path: Path) -> Mapping[str, str]:
    """The files of a record that every run has, by their names in its folder."""
    names = ["provenance.json", "metrics.jsonl", "evals.jsonl"]
    names += [f"attempts/{file.name}" for file in sorted((path / "attempts").iterdir())]
    return {name: (path / name).read_text() for name in names}
