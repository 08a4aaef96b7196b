"""The base of all methods' schemas: it tells core about a method, so that core knows none by name. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar


@dataclass(frozen=True)
class TeacherProblem:
    """The settings on which a stored solution of the teacher's ODE depends, beside teacher, data, seed and budget.

    ``fields`` are names of the schema's fields; the problems of a run fall into ``num_stages`` equal parts of its
    budget, each with problems of its own kind. ``calls``: of the guided teacher, for each sample of the run on average.
    """

    fields: tuple[str, ...]
    num_stages: int = 1
    calls: float = 0.0


@dataclass(frozen=True)
class WeightFile:
    """A file or folder of weights that a method reads beside its backbone's.

    ``path`` and ``hash`` name fields of the schema, those of a part by ``PART.NAME``; a file whose content is fixed
    (checked when it is read) has no ``hash``. ``stand_in`` says what a memory plan assumes while the path is not set.
    ``needed`` is the line for a user who has not set it, ``file`` the file that lies in the folder, ``package`` what
    must be installed beside it.
    """

    path: str
    hash: str | None = None
    stand_in: str = ""
    needed: str = ""
    file: str = ""
    package: str = ""


class MethodConfig:
    """The base of every method's schema; a schema overrides what differs from these answers."""

    trains: ClassVar[bool] = True  # False: a reference row, sampled as it is
    learner: ClassVar[str] = "student"  # the player whose samples the budget's unit ``images`` counts
    # The teacher is what ``train.init_from`` names, kept as a role of its own: a later round of a chain
    teacher_is_parent: ClassVar[bool] = False
    guidance_input: ClassVar[str] = "no"  # whether the student takes guidance as an input: no | may | must

    @property
    def parent_takes_guidance(self) -> bool:
        """Whether a parent takes guidance as an input, if its student does."""
        return False

    def path_of(self, file: WeightFile) -> str | None:
        """The place that the user has given for it."""
        return attrgetter(file.path)(self)

    def set_hash_of(self, file: WeightFile, digest: str) -> None:
        """Note its content, which decides the run's id."""
        part, _, name = file.hash.rpartition(".")
        setattr(attrgetter(part)(self) if part else self, name, digest)

    @property
    def period(self) -> int:
        """Iterations after which the turns repeat; the learner has its turn in one of them."""
        return 1

    @property
    def teacher_guidance(self) -> float:
        """Guidance w of the teacher's pictures beside the student's."""
        return 1.0

    @property
    def teacher_problem(self) -> TeacherProblem | None:
        """The settings on which stored solutions of the teacher depend; None: the method asks for none."""
        return None

    @property
    def weight_files(self) -> tuple[WeightFile, ...]:
        """Weights that these settings read beside the backbone's."""
        return ()
