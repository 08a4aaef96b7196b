"""Arrays of jobs with equal resources, and the work of each of their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ablations.work import EVALUATE, TRAIN, Work
from slurm.resources import Resources


@dataclass(frozen=True)
class Array:
    """Tasks that are submitted together; each does the work of one or more cells at a time. A pack also measures them.

    ``mirrors``: task i starts when task i of that array, which trains what this one measures, has ended well.
    """

    resources: Resources
    tasks: tuple[tuple[Work, ...], ...]
    mirrors: Array | None = None

    @property
    def work(self) -> list[Work]:
        return [work for task in self.tasks for work in task]

    @property
    def kind(self) -> str:
        return self.tasks[0][0].kind

    def __str__(self) -> str:
        cells = sum(work.kind == self.kind for work in self.work)
        return f"{self.kind} {cells} cells in {len(self.tasks)} tasks"

    @property
    def runs_needed(self) -> list[str]:
        """Ids of the runs that must be done first: parents, then what an earlier submission trains."""
        parents = [parent for work in self.work for parent in work.cell.parents]
        ours = {work.cell.id for work in self.work if work.kind == TRAIN}
        trained = [work.cell.id for work in self.work if work.kind == EVALUATE and work.cell.id not in ours]
        return list(dict.fromkeys([*parents, *trained]))


def measured(task: Sequence[Work], measure: dict[str, list[Work]]) -> tuple[Work, ...]:
    """The trainings of a pack and, taken out of ``measure``, the measurements that the same process makes."""
    found = list(task)
    for work in task:
        left = []
        for other in measure.get(work.cell.id, ()):
            is_same = other.cell.key == work.cell.key
            (found if is_same else left).append(other)
        measure[work.cell.id] = left
    return tuple(found)
