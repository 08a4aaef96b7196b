"""Cells that share a base are trained together; what that saves is what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablations.grid import Cell, load
from ablations.logs import logs_of, newest_attempt
from ablations.packs import packs_of, saving
from core.config import compose, resolve
from core.identity import posed_problem
from core.run import Run, find_runs
from experiments.cli import main
from experiments.train import train_config

GRID = """
title: T
base: {tiny: flash/tiny}
seeds: [0, 1]
rows:
  - {id: all}
  - {id: more-steps, set: {method.num_timesteps: 16}}
  - {id: wide, set: {backbone.lora_rank: 8}}
  - {id: child, parent: all}
  - {id: copies, set: {backbone.sharing: full}}
  - {id: no-solution, set: {method.distill_weight: 0}}
references:
  - {id: teacher, experiment: {tiny: teacher/tiny}}
metrics: [diversity]
evaluate: {steps: [1]}
layout: {nfe: [1], splits: [train]}
budgets:
  full: {set: {data.path: "random:x"}}
  real:
    seeds: [0]
    rows: [all, wide, child]
    set:
      train.budget.amount: 8
      eval.num_diversity_prompts: 2
      eval.images_per_prompt: 2
      eval.prompts: a boat
"""


@pytest.fixture
def cells() -> list[Cell]:
    Path("g.yaml").write_text(GRID)
    return load("g.yaml").expand("tiny")


def names(packs: list[tuple[Cell, ...]]) -> list[list[str]]:
    return [[cell.name for cell in pack] for pack in packs]


def test_packs_have_one_base_and_one_seed_and_the_same_problems_first(cells: list[Cell]) -> None:
    assert names(packs_of(cells, 3)) == [
        ["all-s0", "wide-s0", "no-solution-s0"],
        ["all-s1", "wide-s1", "no-solution-s1"],
        ["more-steps-s0", "child-s0"],
        ["more-steps-s1", "child-s1"],
        ["copies-s0"],
        ["copies-s1"],
        ["teacher-s0"],
    ]
    assert names(packs_of(cells[:3], 1)) == [["all-s0"], ["all-s1"], ["more-steps-s0"]]


def test_the_plan_says_what_packs_save(cells: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    common = ["grid", "plan", "g.yaml", "--scale", "tiny", "--pack"]
    assert main([*common, "4"]) == 0
    *_, first, second, _, _, _, _, last = capsys.readouterr().out.splitlines()
    assert first.startswith("one base: all-s0, wide-s0, no-solution-s0, more-steps-s0")
    assert second.startswith("one base: all-s1, wide-s1")
    assert last.startswith("12 trainings on 6 bases; the teacher's problems take ") and last.endswith(
        ", which the store of solutions saves, too"
    )
    assert main([*common, "4", "--set", "execution.use_solution_store=false"]) == 0
    assert "instead of" in (said := capsys.readouterr().out.splitlines()[-1]) and "store" not in said
    assert main([*common, "0"]) == 2
    assert capsys.readouterr().err == "error: --pack=0 is out of range; allowed: at least 1\n"
    assert main([*common, "2", "--set", "execution.sharding=fsdp"]) == 2
    assert capsys.readouterr().err == "error: execution.sharding=fsdp: a pack trains in one process; allowed: none\n"


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("flash/tiny", ["train.budget.amount=256", "train.batch_size=32", "method.distill_loss=mse"]),
        ("dmd2/tiny", ["method.ttur=2", "method.regression_weight=1", "method.regression_steps=4", "method.gan=off"]),
    ],
)
def test_calls_are_what_a_training_counts(experiment: str, overrides: list[str]) -> None:
    """Start points are drawn: their mean over 256 samples is within a tenth of the expected one."""
    more = ["method.adversarial_weight=[0,0,0,0]", "method.dmd_weight=[0,0,0,0]"] if "flash" in experiment else []
    where = ["execution.use_solution_store=false", "eval.prompts=a boat", "train.precision=fp32"]
    config = resolve(compose(experiment, [*overrides, *more, *where]))
    assert train_config(config) == 0
    counted = Run.create(config).metrics()[-1]["evaluations"]
    if experiment == "dmd2/tiny":  # beside the solutions, the student's term asks for one guided call in each turn
        counted["teacher"] -= 2 * config.train.budget.amount * config.train.batch_size // config.method.ttur
    expected = config.method.teacher_problem.calls * posed_problem(config)["samples"]
    assert counted["teacher"] / 2 == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_a_grid_is_run_in_packs(capsys: pytest.CaptureFixture[str]) -> None:
    """Each cell has its run, its log and its numbers; a child waits for its parent."""
    Path("g.yaml").write_text(GRID)
    words = ["grid", "run", "g.yaml", "--scale", "tiny", "--budget", "real", "--pack", "3"]
    assert main(words) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert said.count("with 1 others on one base") == 2 and "4 done" in said
    runs = {path.name.rpartition("-")[0]: Run.open(path) for path in find_runs("runs")}
    assert runs["wide-s0"].noted("packed_with") == [runs["all-s0"].id]
    assert runs["child-s0"].noted("packed_with") is None
    cells = {cell.name: cell for cell in load("g.yaml").expand("tiny", "real")}
    (log,) = logs_of(cells["wide-s0"], Path("runs"))
    told = "\n".join(newest_attempt(log))
    assert runs["wide-s0"].id in told and "device-hours" in told and runs["all-s0"].id not in told
    assert main(words) == 0 and " started" not in capsys.readouterr().out
    assert saving(packs_of(list(cells.values()), 3)).cells == 4
