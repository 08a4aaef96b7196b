"""Small run folders in the real format, written through the real ``Run``: a grid of two rows and a teacher."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ablations.grid import Cell, Grid, load
from analysis import claims
from analysis.collect import Results, results
from analysis.tables import Table, build_table
from core.metrics.protocol import Protocol
from core.run import Run

GRID = """
title: Influence of a term
source: A paper, Figure 5
base: {tiny: flash/tiny}
seeds: [0, 1, 2]
rows:
  - {id: plain, label: "$L_{distil}$", set: {data.path: "random:x", method.dmd_weight: [0, 0, 0, 0]}}
  - {id: full, label: "$L_{distil} + L_{DMD}$", set: {data.path: "random:x"}}
references:
  - {id: teacher, label: "Teacher, 50 steps", experiment: {tiny: teacher/tiny}, set: {data.path: "random:x"}}
budgets:
  full: {set: {eval.num_images: 100, eval.num_reference: 500}}
  demo: {seeds: [0], set: {train.budget.amount: 16, eval.num_images: 10, eval.num_reference: 500}}
metrics: [kid, clip_score]
evaluate: {steps: [1, 2]}
layout: {nfe: [2], splits: [train], best: [kid, clip_score]}
"""
CLAIMS = """
margins: {kid: 0.02, clip_score: 0.02}
claims:
- id: term
  claim: The term lowers FID
  source: A paper, Section 1
  grid: influence
  seeds: 3
  contrasts: [{row: full, versus: plain, metric: kid, expected: lower}]
"""


@dataclass
class World:
    """A grid and where its runs lie."""

    grid: Grid
    runs: Path

    def cells(self, budget: str = "full") -> dict[tuple[str, int], Cell]:
        return {(cell.row, cell.seed): cell for cell in self.grid.expand("tiny", budget)}

    def run(self, cell: Cell, state: str = "done", dirty: bool = False, runs: Path | None = None) -> Run:
        """A finished run without numbers."""
        config = copy.deepcopy(cell.config)
        config.execution.runs_dir = str(runs or self.runs)
        run = Run.create(config)
        file = run.path / "provenance.json"
        facts = json.loads(file.read_text()) | {"dirty_patch": "diff" if dirty else "", "commit": "abc123"}
        file.write_text(json.dumps(facts))
        run.begin_attempt()
        run.end_attempt(state)
        return run

    def measure(self, run: Run, metric: str, value: float, steps: int = 2, **changes: Any) -> None:
        """One line of evals.jsonl; ``changes`` go into the protocol, or into the line if they are its own."""
        trains = run.config.method.trains
        own = {key: changes.pop(key) for key in ("weights", "images") if key in changes}
        fields: dict[str, Any] = {
            "metric": metric, "scale": "tiny", "split": "train", "data_hash": "d", "prompts_hash": "p",
            "num_images": run.config.eval.num_images, "judge": "judge", "judge_hash": "j", "resize": "r",
            "estimator": "e", "reference_hash": "real", "num_reference": 500, "steps": steps,
            "solver": "lcm" if trains else "dpmpp_2m",
        }  # fmt: skip
        protocol = Protocol(**fields | changes)
        line = {
            "metric": metric, "value": value, "n": protocol.num_images, "protocol": protocol.id,
            "protocol_fields": protocol.fields(), "split": protocol.split, "steps": steps,
            "nfe": steps if trains else 2 * steps, "guidance": protocol.guidance, "seed": 0,
            "weights": "student" if trains else "teacher", "images": 32 if trains else 0,
        }  # fmt: skip
        run.append_eval(line | own)

    def finish(self, values: dict[tuple[str, int], float], budget: str = "full") -> None:
        """Runs with kid = value and clip_score = 0.3 + value at 1 and 2 steps (teacher: 50)."""
        cells = self.cells(budget)
        for key, value in values.items():
            run = self.run(cells[key])
            for steps in (1, 2) if run.config.method.trains else (50,):
                self.measure(run, "kid", value, steps)
                self.measure(run, "clip_score", 0.3 + value, steps)

    def frame(self, budget: str = "full", *more: Path) -> Any:
        return self.results(budget, *more).frame

    def results(self, budget: str = "full", *more: Path) -> Results:
        return results(self.grid, "tiny", budget, [self.runs, *more])

    def table(self, budget: str = "full", *more: Path) -> Table:
        return build_table(self.results(budget, *more))


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """The grid, expanded once for all tests."""
    file = tmp_path_factory.mktemp("grid") / "influence.yaml"
    file.write_text(GRID)
    loaded = load(str(file))
    object.__setattr__(loaded, "expand", functools.cache(loaded.expand))
    return loaded


@pytest.fixture
def world(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """No run yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "influence.yaml").write_text(GRID)
    (tmp_path / "claims.yaml").write_text(CLAIMS)
    monkeypatch.setattr(claims, "FILE", tmp_path / "claims.yaml")
    return World(grid, tmp_path / "runs")


@pytest.fixture(scope="session")
def finished(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells measured: ``full`` is below ``plain`` in kid by 0.0009, 0.0011 and 0.001."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    plain = {("plain", 0): 0.004, ("plain", 1): 0.006, ("plain", 2): 0.005}
    other = {("full", 0): 0.0031, ("full", 1): 0.0049, ("full", 2): 0.004}
    World(grid, runs).finish(plain | other | {("teacher", 0): 0.0036})
    return runs


@pytest.fixture
def full(world: World, finished: Path) -> World:
    """A copy of ``finished`` that a test may change."""
    shutil.copytree(finished, world.runs)
    return world


@pytest.fixture
def sheet() -> Callable[[Run, int], Path]:
    """Write a sample sheet of noise, which compresses badly."""

    def write(run: Run, images: int) -> Path:
        pixels = np.random.default_rng(images).integers(0, 256, (400, 600, 3), dtype=np.uint8)
        path = run.path / "samples" / f"{images:010d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    return write
