"""Submit what a grid lacks: arrays of equal resources through submitit, each written down before and after sbatch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.grid import Cell
from ablations.run_local import ALLOCATOR
from ablations.status import Status, plan
from core.schema import UserError
from slurm.job import CellsJob
from slurm.ledger import Ledger, Submission
from slurm.profile import Profile
from slurm.queue import Queue
from slurm.resources import Resources, micro_batch, resources_of

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

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Cells that are neither final, nor at work, nor waiting in the queue; parents first."""
        self.adopt_orphans()
        found = plan(cells, self.runs_dir)
        jobs = self.ledger.jobs()
        newest = {run: entries[-1][1] for run, entries in jobs.items()}
        states = self.queue.states(newest.values()) if self.profile.executor == "slurm" and newest else {}
        return [item.cell for item in found if not self._is_taken(item, newest, states)]

    @staticmethod
    def _is_taken(item: Status, newest: dict[str, str], states: dict[str, Any]) -> bool:
        if item.is_final or item.state == "running":
            return True
        state = states.get(newest.get(item.cell.id, ""))
        return state is not None and state.alive

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
        """Cells grouped by resources, packed into tasks, chunked to what an array holds."""
        groups: dict[Resources, list[Cell]] = {}
        for cell in dict.fromkeys(cells):
            resources = resources_of(cell, **changes)
            resources.check(self.profile, cell.experiment)
            micro_batch(cell.config.train.batch_size, resources)
            groups.setdefault(resources, []).append(cell)
        for resources, members in groups.items():
            size = resources.cells_per_job
            tasks = [tuple(members[i : i + size]) for i in range(0, len(members), size)]
            for start in range(0, len(tasks), MOST_TASKS):
                yield Array(resources, tuple(tasks[start : start + MOST_TASKS]))

    def submit(self, array: Array) -> Submission:
        """Intent, sbatch, id."""
        runs = [[cell.id for cell in task] for task in array.tasks]
        from submitit.core.utils import FailedJobError

        submission = self.ledger.intend(self.grid, "train", runs, {"code": str(self.code)})
        executor = self._executor(array.resources, submission.name)
        jobs = [self._job(task, array.resources) for task in array.tasks]
        try:
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
        except FailedJobError as error:  # sbatch said no: nothing was submitted
            reason = said(error)
            self.ledger.abandon(submission, reason)
            raise UserError(f"sbatch: {reason}") from None
        return self.ledger.confirm(submission, [job.job_id for job in submitted])

    def _job(self, task: Sequence[Cell], resources: Resources) -> CellsJob:
        commands = [(str(self.log_of(cell)), self.command(cell, resources)) for cell in task]
        environment = {**ALLOCATOR, "OMP_NUM_THREADS": str(resources.cpus_per_process), "TQDM_DISABLE": "1"}
        return CellsJob(commands, environment | {"PYTHONPATH": str(self.code)})

    def log_of(self, cell: Cell) -> Path:
        """Where the cell's output goes, whatever job it is in."""
        return self.ledger.root / "logs" / f"{cell.id}.log"

    def command(self, cell: Cell, resources: Resources) -> list[str]:
        """The ordinary training command, with absolute paths and the micro-batch of these devices."""
        python = self.profile.python or _this_python()
        size = micro_batch(cell.config.train.batch_size, resources)
        cache = Path(cell.config.execution.cache_dir).resolve()  # the job's own folder is that of the code
        where = [f'execution.runs_dir="{self.runs_dir}"', f'execution.cache_dir="{cache}"']
        where += [f"execution.num_threads={resources.cpus_per_process}"]
        where += [] if size is None else [f"execution.micro_batch={size}"]
        return [python, "-m", "experiments.train", "--evaluate", cell.experiment, *cell.overrides, *where]

    def _executor(self, resources: Resources, name: str) -> Any:
        folder = self.ledger.root / "jobs" / "%j"
        if self.profile.executor == "slurm":
            from submitit.slurm.slurm import SlurmExecutor

            executor: Any = SlurmExecutor(folder, max_num_timeout=1000, python=self.profile.python)
            executor.update_parameters(**slurm_parameters(self.profile, resources, name, self.code))
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
        command = f"{self.profile.python or _this_python()} -u -m submitit.core._submit {self.ledger.root}/jobs/%j"
        return _make_sbatch_string(command=command, folder=self.ledger.root / "jobs" / "%j", **parameters)


def slurm_parameters(profile: Profile, resources: Resources, name: str, code: Path) -> dict[str, Any]:
    """submitit's parameters: the site's options, the run's resources, and the code that the job imports."""
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
        "additional_parameters": {"requeue": True, **profile.sbatch},
    }
    return {key: value for key, value in values.items() if value not in (None, [])}


def said(error: BaseException) -> str:
    """sbatch's own words, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if "sbatch: " in line]
    return "; ".join(line.partition("sbatch: ")[2] for line in lines) or str(error).strip().splitlines()[0]


def _this_python() -> str:
    import sys

    return sys.executable
