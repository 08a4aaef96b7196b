"""Packs of cells on a cluster: which cells share a task, and what its job is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablations.grid import load
from ablations.work import EVALUATE, TRAIN, Work
from core.config import UserError
from experiments.packing import read_pack
from slurm.profile import Profile
from slurm.queue import NoQueue
from slurm.submit import Submitter

PACKED = """
title: Packs
base: {tiny: flash/tiny}
seeds: [0, 1]
rows: [{id: a}, {id: b, set: {method.student_lr: 1.0e-3}}, {id: c, parent: a}, {id: d, set: {eval.sampler: ddim}}]
references: [{id: t, experiment: {tiny: teacher/tiny}}]
metrics: [kd_effnet]
evaluate: {steps: [1]}
layout: {nfe: [1], splits: [train]}
"""


def test_a_task_trains_and_measures_the_cells_of_a_pack(tmp_path: Path) -> None:
    """Row d is the run of row a, measured otherwise: one is measured where it is trained, the other elsewhere."""
    (tmp_path / "packed.yaml").write_text(PACKED)
    cells = {cell.name: cell for cell in load(str(tmp_path / "packed.yaml")).expand("tiny")}
    site = Profile(cpus_per_node=64, mem_gb_per_node=64)
    submitter = Submitter("packed", site, tmp_path / "runs", tmp_path, print, NoQueue())
    arrays = list(submitter.arrays(submitter.missing(list(cells.values())), pack=8))
    told = [
        (array.kind, [[f"{work.kind} {work.cell.name}" for work in task] for task in array.tasks]) for array in arrays
    ]
    both = {seed: [f"{kind} {row}-s{seed}" for kind in (TRAIN, EVALUATE) for row in "db"] for seed in (0, 1)}
    alone = [[f"{TRAIN} c-s{seed}", f"{EVALUATE} c-s{seed}"] for seed in (0, 1)]
    rest = [["evaluate a-s0"], ["evaluate a-s1"], ["evaluate t-s0"]]
    assert told == [(TRAIN, [both[0], both[1]]), (TRAIN, alone), (EVALUATE, rest)]
    assert str(arrays[0]) == "train 4 cells in 2 tasks" and arrays[0].runs_needed == []
    assert arrays[1].runs_needed == [cells["a-s0"].id, cells["a-s1"].id]
    assert "#SBATCH --mem=11GB" in submitter.sbatch_text(arrays[0]), "4 GB, and one for each of up to 7 others"

    ((log, command),) = submitter._job(arrays[0].tasks[0], arrays[0].resources).commands
    entries = read_pack(Path(command[3]))
    assert command[1:3] == ["-m", "experiments.pack"] and Path(log).parent == Path(command[3]).parent
    assert [entry.config().execution.label for entry in entries] == ["d-s0", "b-s0"]
    assert {entry.config().execution.runs_dir for entry in entries} == {str(tmp_path / "runs")}
    assert [Path(entry.log).stem for entry in entries] == [cells["a-s0"].id, cells["b-s0"].id]
    with pytest.raises(UserError, match="pack=2 needs runs of one process, and one process in a job"):
        list(submitter.arrays([Work(TRAIN, cells["a-s0"])], pack=2, cells_per_job=2))
