"""Cells that are trained together in one process on one frozen base, and what that saves. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablations.grid import Cell
from ablations.work import job_root, pack_command
from core.config import UserError
from core.identity import posed_problem
from experiments.packing import Entry, base_of, check_base, may_be_packed, write_pack


def companions(first: Cell, others: Iterable[Cell], most: int) -> list[Cell]:
    """Up to ``most`` of ``others`` that may be trained with ``first``, each another run, in their order.

    They have its base and its seed, so that data and draws are the same; those that pose the teacher the problems that
    ``first`` poses come before the rest.
    """
    if most < 1 or not may_be_packed(first.config):
        return []
    base, problem = _base(first), posed_problem(first.config)
    found = {cell.id: cell for cell in others if may_be_packed(cell.config) and _base(cell) == base}
    found.pop(first.id, None)
    ordered = sorted(found.values(), key=lambda cell: posed_problem(cell.config) != problem)
    return ordered[:most]


def _base(cell: Cell) -> str:
    return json.dumps([cell.seed, base_of(cell.config)], sort_keys=True)


def packs_of(cells: Sequence[Cell], most: int) -> list[tuple[Cell, ...]]:
    """All cells in packs of up to ``most``, in the order of their first ones.

    A cell that cannot be trained with others is alone, and a child comes in a later pack than its parent.
    """
    left, out = list(cells), []
    while left:
        first = left[0]
        waiting = {cell.id for cell in left}
        ready = [cell for cell in left[1:] if not waiting & set(cell.parents)]
        pack = (first, *companions(first, ready, most - 1))
        out.append(pack)
        left = [cell for cell in left if cell not in pack]
    return out


def check_packs(cells: Iterable[Cell], most: int) -> None:
    """UserError for a number below 1, and where no training may be packed."""
    if most < 1:
        raise UserError(f"--pack={most} is out of range; allowed: at least 1")
    training = [cell.config for cell in cells if cell.config.method.trains]
    if most > 1 and training and not any(map(may_be_packed, training)):
        check_base(training[:1])


def pack_of(words: Iterable[Sequence[str]], logs: Iterable[Path], runs_dir: Path) -> tuple[list[str], Path]:
    """The command that trains and measures runs in one process, and its log.

    ``words``: experiment and overrides of each run; its own lines go to one of ``logs``.
    """
    told = zip(words, logs, strict=True)
    entries = [Entry(experiment, tuple(overrides), str(log)) for (experiment, *overrides), log in told]
    file = write_pack(job_root(runs_dir) / "packs", entries)
    return pack_command(file), file.with_suffix(".log")


@dataclass(frozen=True)
class Saving:
    """Savings of packs against a process for each cell. ``calls``: of the guided teacher, to solve all its problems."""

    packs: int
    cells: int
    calls: float
    packed_calls: float
    stored: bool  # the cells share their solutions on disk, whether packed or not

    def __str__(self) -> str:
        text = f"{self.cells} trainings on {self.packs} bases"
        if not self.calls:
            return text
        calls = f"the teacher's problems take {self.packed_calls:,.0f} guided calls instead of {self.calls:,.0f}"
        already = ", which the store of solutions saves, too" if self.stored else ""
        return f"{text}; {calls}{already}"


def saving(packs: Sequence[Sequence[Cell]]) -> Saving:
    """Trainings, bases, and calls of the teacher with packs and without; a store of solutions is left aside."""
    cells = [cell for pack in packs for cell in pack]
    packed = sum(sum({_problem(cell): _calls(cell) for cell in pack}.values()) for pack in packs)
    stored = all(cell.config.execution.use_solution_store for cell in cells)
    return Saving(len(packs), len(cells), sum(map(_calls, cells)), packed, stored)


def _problem(cell: Cell) -> str:
    return json.dumps(posed_problem(cell.config), sort_keys=True)


def _calls(cell: Cell) -> float:
    """Calls of the guided teacher that solve the problems of one training."""
    problem = posed_problem(cell.config)
    return 0.0 if problem is None else problem["samples"] * cell.config.method.teacher_problem.calls
