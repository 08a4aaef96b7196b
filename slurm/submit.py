"""Submit what a grid lacks: arrays of equal resources through submitit, each written down before and after sbatch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ablations.grid import Cell
from ablations.run_local import ALLOCATOR, job_environment, train_command
from core.schema import UserError
from slurm.job import CellsJob
from slurm.ledger import Ledger, Submission
from slurm.profile import Profile
from slurm.queue import Queue
from slurm.resources import Resources, micro_batch, resources_of
from slurm.status import BROKEN, TAKEN, grid_states

MOST_TASKS = 1000  # of one array; MaxArraySize is 1001 by default
ORPHAN_S = 60.0  # sbatch answers within this


@dataclass(frozen=True)
class Array:
    """Tasks that are submitted together; each task is one or more cells."""

    resources: Resources
    tasks: tuple[tuple[Cell, ...], ...]


class Submitter:
    """Plans and submits the cells of one grid to one cluster."""

    def __init__(self, grid: str, profile: Profile, runs_dir: Path, code: Path, say: Callable[[str], None]) -> None:
        self.grid, self.profile, self.runs_dir, self.code, self.say = grid, profile, runs_dir.resolve(), code, say
        self.ledger = Ledger(runs_dir)
        self.queue = Queue()

    def missing(self, cells: Sequence[Cell], retry: Sequence[str] = ()) -> list[Cell]:
        """Cells that are neither final, nor at work, nor waiting in the queue; parents first.

        What has failed, was cancelled, or is lost is submitted again only if ``retry`` names its state or its run.
        """
        self.adopt_orphans()
        out = []
        for found in grid_states(cells, self.runs_dir, self.queue):
            again = found.state in retry or found.cell.id in retry
            if found.state not in TAKEN and (found.state not in BROKEN or not found.job or again):
                out.append(found.cell)
        return out

    def adopt_orphans(self) -> None:
        """Intents without an id: a submitter died between writing them and hearing SLURM's answer."""
        for submission in self.ledger.submissions():
            if submission.jobs or submission.abandoned:
                continue
            job = self.queue.by_name(submission.name) if self.profile.executor == "slurm" else None
            if job is not None:
                self.ledger.confirm(submission, submission.jobs_of(job))
                self.say(f"{submission.name}: found as job {job}")
            elif time.time() - submission.created > ORPHAN_S or self.profile.executor != "slurm":
                self.ledger.abandon(submission, "SLURM knows no job of this name")
            else:
                raise UserError(f"{submission.name} was being submitted less than {ORPHAN_S:.0f} s ago; try again then")

    def arrays(self, cells: Sequence[Cell], **changes: object) -> Iterator[Array]:
        """Cells grouped by resources and generation, packed into tasks, chunked to what an array holds.

        A cell whose parent is among ``cells`` comes in a later array than its parent.
        """
        groups: dict[tuple[int, Resources], list[Cell]] = {}
        generations: dict[str, int] = {}
        for cell in dict.fromkeys(cells):
            resources = resources_of(cell, **changes)
            resources.check(self.profile, cell.experiment)
            micro_batch(cell.config.train.batch_size, resources)
            generation = 1 + max((generations.get(parent, -1) for parent in cell.parents), default=-1)
            generations[cell.id] = generation
            groups.setdefault((generation, resources), []).append(cell)
        for (_, resources), members in sorted(groups.items(), key=lambda group: group[0][0]):
            size = resources.cells_per_job
            tasks = [tuple(members[i : i + size]) for i in range(0, len(members), size)]
            for start in range(0, len(tasks), MOST_TASKS):
                yield Array(resources, tuple(tasks[start : start + MOST_TASKS]))

    def submit(self, array: Array) -> Submission:
        """Intent, sbatch, id."""
        from submitit.core.utils import FailedJobError

        runs = [[cell.id for cell in task] for task in array.tasks]
        facts = {"code": str(self.code), "resources": asdict(array.resources)}
        submission = self.ledger.intend(self.grid, self.profile.executor, runs, facts)
        executor = self._executor(array.resources, submission.name, self.parent_jobs(array))
        jobs = [self._job(task, array.resources) for task in array.tasks]
        try:
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
        except FailedJobError as error:  # sbatch said no: nothing was submitted
            reason = said(error)
            self.ledger.abandon(submission, reason)
            raise UserError(f"sbatch: {reason}") from None
        return self.ledger.confirm(submission, [job.job_id for job in submitted])

    def parent_jobs(self, array: Array) -> list[str]:
        """Jobs of parents that are not done yet: this array starts when they have ended well."""
        jobs = self.ledger.jobs()
        parents = dict.fromkeys(parent for task in array.tasks for cell in task for parent in cell.parents)
        waiting = [jobs[parent][-1][1] for parent in parents if parent in jobs]
        done = {task for task, state in self.queue.states(waiting).items() if state.state == "COMPLETED"}
        return [job for job in waiting if job not in done]

    def _job(self, task: Sequence[Cell], resources: Resources) -> CellsJob:
        commands = [(str(self.log_of(cell)), self.command(cell, resources)) for cell in task]
        environment = {**ALLOCATOR, **job_environment(resources.cpus_per_process), "PYTHONPATH": str(self.code)}
        return CellsJob(commands, environment)

    @property
    def python(self) -> str:
        """The interpreter on the nodes."""
        return self.profile.python or sys.executable

    def log_of(self, cell: Cell) -> Path:
        """Where the cell's output goes, whatever job it is in."""
        return self.ledger.root / "logs" / f"{cell.id}.log"

    def command(self, cell: Cell, resources: Resources) -> list[str]:
        """The ordinary training command, with absolute paths and the micro-batch of these devices."""
        size = micro_batch(cell.config.train.batch_size, resources)
        cache = Path(cell.config.execution.cache_dir).resolve()  # the job's own folder is that of the code
        here = replace(cell, overrides=tuple(map(_absolute, cell.overrides)))
        _, *words = train_command(here, self.runs_dir, resources.cpus_per_process)
        more = [] if size is None else [f"execution.micro_batch={size}"]
        return [self.python, *words, f'execution.cache_dir="{cache}"', *more]

    def _executor(self, resources: Resources, name: str, after: Sequence[str]) -> Any:
        folder = self.ledger.root / "jobs" / "%j"
        if self.profile.executor == "slurm":
            from submitit.slurm.slurm import SlurmExecutor

            executor: Any = SlurmExecutor(folder, max_num_timeout=1000, python=self.profile.python)
            executor.update_parameters(**slurm_parameters(self.profile, resources, name, self.code, after))
            return executor
        from submitit.auto.auto import AutoExecutor

        executor = AutoExecutor(folder, cluster=self.profile.executor)
        executor.update_parameters(timeout_min=self.profile.time_min)
        return executor

    def sbatch_text(self, array: Array) -> str:
        """The file that would be submitted."""
        from submitit.slurm.slurm import _make_sbatch_string

        count = len(array.tasks)
        parameters = slurm_parameters(self.profile, array.resources, f"fewstep-{self.grid}", self.code)
        if count > 1:
            parameters["map_count"] = count
        command = f"{self.python} -u -m submitit.core._submit {self.ledger.root}/jobs/%j"
        return _make_sbatch_string(command=command, folder=self.ledger.root / "jobs" / "%j", **parameters)


def slurm_parameters(
    profile: Profile, resources: Resources, name: str, code: Path, after: Sequence[str] = ()
) -> dict[str, Any]:
    """submitit's parameters: the site's options, the run's resources, and the code that the job imports.

    ``after``: jobs that must have ended well before; if one fails, this job is taken out of the queue.
    """
    more = {"requeue": True, **({"kill-on-invalid-dep": "yes"} if after else {}), **profile.sbatch}
    values: dict[str, Any] = {
        "job_name": name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join(profile.exclude) or None,
        "time": profile.time_min,
        "signal_delay_s": profile.signal_s,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.processes_per_node,
        "cpus_per_task": resources.cpus_per_process,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": f"{resources.mem_gb * resources.cells_per_job}GB",
        "array_parallelism": profile.max_parallel,
        "setup": [*profile.setup_lines, f"export PYTHONPATH={code}", f"cd {code}"],
        "srun_args": profile.srun,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
        "additional_parameters": more,
    }
    return {key: value for key, value in values.items() if value not in (None, [])}


def _absolute(override: str) -> str:
    """A relative path of the submitting folder stays what it was: jobs start in the folder of the code."""
    key, _, value = override.partition("=")
    path = Path(value.strip("\"'"))
    if not key.endswith(("path", "init_from")) or path.is_absolute() or not path.exists():
        return override
    return f"{key}={json.dumps(str(path.resolve()))}"


def said(error: BaseException) -> str:
    """sbatch's own words, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if "sbatch: " in line]
    return "; ".join(line.partition("sbatch: ")[2] for line in lines) or str(error).strip().splitlines()[0]
