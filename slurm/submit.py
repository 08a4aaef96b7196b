"""Submit what a grid lacks: arrays of equal resources through submitit, each written down before and after sbatch."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ablations.grid import Cell
from ablations.job import CellsJob
from ablations.logs import log_of
from ablations.packs import pack_of, packs_of
from ablations.status import DIVERGED, FINAL
from ablations.work import (
    ALLOCATOR,
    EVALUATE,
    TRAIN,
    Work,
    evaluate_command,
    job_environment,
    train_command,
    train_words,
)
from core.run import atomic_write
from core.schema import UserError
from core.training.preemption import EXIT_CODE
from slurm.arrays import Array, measured
from slurm.ledger import Ledger, Submission
from slurm.profile import Profile, check_shell_safe
from slurm.queue import Queue
from slurm.resources import Resources, micro_batch, resources_of
from slurm.status import BROKEN, TAKEN, bad_nodes, grid_status

MOST_TASKS = 1000  # of one array, where the cluster allows it
SUBMITITS_OWN = ("output", "error", "wckey")  # options that a job file without it does not need
ORPHAN_S = 60.0  # sbatch answers within this


class Submitter:
    """Finds what one grid lacks and submits it to one cluster."""

    def __init__(
        self,
        grid: str,
        profile: Profile,
        runs_dir: Path,
        code: Path,
        say: Callable[[str], None],
        queue: Queue | None = None,
    ) -> None:
        check_shell_safe("grid", grid)
        for folder in (runs_dir.resolve(), code):
            if set(str(folder)) & set("\"'`$\\\n"):
                raise UserError(f"{str(folder)!r} has quotes, $, \\ or line breaks, which a job file cannot hold")
        self.grid, self.profile, self.runs_dir, self.code, self.say = grid, profile, runs_dir.resolve(), code, say
        self.ledger = Ledger(runs_dir)
        self.queue = queue or Queue()
        self._ids: dict[Array, str] = {}  # of what this object has submitted

    def missing(self, cells: Sequence[Cell], retry: Sequence[str] = (), *, adopt: bool = True) -> list[Work]:
        """Work that is neither done, nor running, nor queued; parents first, a run before its measurement.

        What has failed, was cancelled, or is lost is submitted again only if ``retry`` names its state or its run.
        Not ``adopt``: nothing is written, as a dry run wants it.
        """
        if adopt:
            self.adopt_orphans()
        submitted = self.ledger.jobs()
        out: list[Work] = []
        lost: set[str] = set()  # runs from which nothing can start
        for found in grid_status(cells, self.runs_dir, self.queue):
            if found.state == DIVERGED or lost & set(found.cell.parents):
                lost.add(found.cell.id)
            if found.state not in FINAL and found.cell.id in lost:
                self.say(f"{found.cell.name}: not submitted, its parent {found.cell.parents[0]} has diverged")
                continue
            again = found.state in retry or found.cell.id in retry
            if found.state in FINAL or (found.state in BROKEN and found.job and not again):
                continue
            measuring = Work(EVALUATE, found.cell)
            training = submitted.get(found.cell.id) if found.work.kind == TRAIN and found.job else None
            if found.state not in TAKEN:
                out += [found.work, measuring]
            elif training and _older(submitted.get(measuring.key), training):  # its submitter died in between
                out.append(measuring)
        return list({work.key: work for work in out}.values())

    def adopt_orphans(self) -> None:
        """Confirm or abandon intents without an id, whose submitter died before it heard SLURM's answer."""
        for submission in self.ledger.submissions():
            if submission.jobs or submission.abandoned:
                continue
            job = self.queue.by_name(submission.name)
            if job is not None:
                self.ledger.confirm(submission, submission.jobs_of(job))
                self.say(f"{submission.name}: found as job {job}")
            elif time.time() - submission.created > ORPHAN_S:
                self.ledger.abandon(submission, "SLURM knows no job of this name")
            else:
                raise UserError(f"{submission.name} was being submitted less than {ORPHAN_S:.0f} s ago; try again then")

    def arrays(self, missing: Sequence[Work], **changes: object) -> Iterator[Array]:
        """Arrays of the missing work, grouped by resources and generation; none has more tasks than an array may.

        A cell whose parent is to be trained too comes in a later array; what measures a run comes right after it.
        """
        measure: dict[str, list[Work]] = {}
        for work in missing:
            if work.kind == EVALUATE:
                measure.setdefault(work.cell.id, []).append(work)
        for (_, resources, _), works in sorted(self._groups(missing, changes), key=lambda group: group[0][0]):
            for tasks in self._chunks(works, resources):
                if resources.pack > 1:
                    yield Array(resources, tuple(measured(task, measure) for task in tasks))
                    continue
                training = Array(resources, tasks)
                yield training
                measuring = tuple(tuple(w for work in task for w in measure.get(work.cell.id, ())) for task in tasks)
                if all(measuring):
                    for work in training.work:
                        measure.pop(work.cell.id, None)
                    asked = self._resources(measuring[0][0], changes)
                    yield Array(replace(asked, cells_per_job=max(map(len, measuring))), measuring, training)
        rest: dict[Resources, list[Work]] = {}
        for work in (work for works in measure.values() for work in works):
            rest.setdefault(self._resources(work, changes), []).append(work)
        for resources, works in rest.items():
            yield from (Array(resources, tasks) for tasks in self._chunks(works, resources))

    def _groups(
        self, missing: Sequence[Work], changes: Mapping[str, object]
    ) -> Iterable[tuple[tuple[int, Resources, Resources], list[Work]]]:
        """Trainings by generation, by what they need, and by what measuring them needs."""
        groups: dict[tuple[int, Resources, Resources], list[Work]] = {}
        generations: dict[str, int] = {}
        for work in missing:
            if work.kind == EVALUATE:
                continue
            generation = 1 + max((generations.get(parent, -1) for parent in work.cell.parents), default=-1)
            generations[work.cell.id] = generation
            later = self._resources(Work(EVALUATE, work.cell), changes)
            groups.setdefault((generation, self._resources(work, changes), later), []).append(work)
        return groups.items()

    def _resources(self, work: Work, changes: Mapping[str, object]) -> Resources:
        resources = resources_of(work, **changes)
        resources.check(self.profile, work.cell.experiment)
        if work.kind == TRAIN:
            micro_batch(work.cell.config.train.batch_size, resources)
        return resources

    def _chunks(self, works: Sequence[Work], resources: Resources) -> Iterator[tuple[tuple[Work, ...], ...]]:
        tasks, most = _tasks(works, resources), min(MOST_TASKS, self.most_tasks)
        for start in range(0, len(tasks), most):
            yield tuple(tasks[start : start + most])

    @cached_property
    def most_tasks(self) -> int:
        """The most tasks that one array may have on this cluster."""
        return self.queue.max_array_size()

    @cached_property
    def bad_nodes(self) -> list[str]:
        """Nodes to leave out from now on: only failures were seen on them."""
        jobs = [job for entries in self.ledger.jobs().values() for _, job in entries]
        bad = bad_nodes(self.queue.statuses(jobs).values(), self.profile.failures_per_node)
        if bad:
            self.say(f"left out, because cells only failed there: {', '.join(bad)}")
        return bad

    def submit(self, array: Array) -> Submission:
        """Write the intent, call sbatch, write down the id."""
        from submitit.core.utils import FailedJobError

        tasks = [[work.key for work in task] for task in array.tasks]
        facts = {"code": str(self.code), "resources": asdict(array.resources)}
        submission = self.ledger.intend(self.grid, array.kind, tasks, facts)
        executor = self._executor(array, submission.name)
        jobs = [self._job(task, array.resources) for task in array.tasks]
        try:
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
        except FailedJobError as error:  # sbatch said no: nothing was submitted
            reason = said(error)
            self.ledger.abandon(submission, reason)
            raise UserError(f"sbatch: {reason}") from None
        self._ids[array] = submitted[0].job_id.partition("_")[0]
        return self.ledger.confirm(submission, [job.job_id for job in submitted])

    def after(self, array: Array) -> str:
        """sbatch's dependency: jobs that must end well before this array starts; empty when none is alive."""
        if array.mirrors is not None:
            word = "aftercorr" if len(array.tasks) > 1 else "afterok"
            return f"{word}:{self._ids[array.mirrors]}"
        jobs = self.ledger.jobs()
        newest = [jobs[run][-1][1] for run in array.runs_needed if run in jobs]
        alive = self.queue.alive(newest)
        return f"afterok:{':'.join(alive)}" if alive else ""

    def _job(self, task: Sequence[Work], resources: Resources) -> CellsJob:
        if resources.pack > 1:
            commands = [self._pack([work for work in task if work.kind == TRAIN], resources)]
        else:
            commands = [(str(log_of(self.runs_dir, work.key)), self.command(work, resources)) for work in task]
        environment = {**ALLOCATOR, **job_environment(resources.cpus_per_process), "PYTHONPATH": str(self.code)}
        return CellsJob(commands, environment, self.profile.save_s)

    def _pack(self, trainings: Sequence[Work], resources: Resources) -> tuple[str, list[str]]:
        """Log and command of a process that trains and measures several runs."""
        words = []
        for work in trainings:
            cell, where = self._there(work, resources)
            words.append([*train_words(cell, self.runs_dir, resources.cpus_per_process), *where])
        logs = [log_of(self.runs_dir, work.key) for work in trainings]
        command, log = pack_of(words, logs, self.runs_dir)
        return str(log), [self.python, *command[1:]]

    @property
    def python(self) -> str:
        """The interpreter on the nodes."""
        return self.profile.python or sys.executable

    def command(self, work: Work, resources: Resources, *, whole: bool = False) -> list[str]:
        """The command that does ``work``, with absolute paths and the micro-batch of these devices.

        ``whole``: what is trained is measured by the same command.
        """
        (cell, where), threads = self._there(work, resources), resources.cpus_per_process
        if work.kind == TRAIN:
            early = any(at < 1 for at in cell.config.eval.at)  # what is measured on the way, the training measures
            words = train_command(cell, self.runs_dir, threads, evaluate=early or whole)
        elif cell.config.method.trains:
            words = evaluate_command(cell, self.runs_dir, threads)
        else:
            words = train_command(cell, self.runs_dir, threads)
        return [self.python, *words[1:], *where]

    def _there(self, work: Work, resources: Resources) -> tuple[Cell, list[str]]:
        """The cell with absolute paths, since a job's own folder is that of the code, and overrides of its devices."""
        cell = replace(work.cell, overrides=tuple(map(absolute, work.cell.overrides)))
        where = [f'execution.cache_dir="{Path(cell.config.execution.cache_dir).resolve()}"']
        size = micro_batch(cell.config.train.batch_size, resources) if work.kind == TRAIN else None
        return cell, where if size is None else [*where, f"execution.micro_batch={size}"]

    def _executor(self, array: Array, name: str) -> Any:
        from submitit.slurm.slurm import SlurmExecutor

        executor = SlurmExecutor(self.ledger.job_folder, max_num_timeout=1000, python=self.profile.python)
        parameters = slurm_parameters(self.profile, array.resources, name, self.code, self.after(array), self.bad_nodes)
        executor.update_parameters(**parameters)
        return executor

    def write_job_files(self, cells: Sequence[Cell], folder: Path, **changes: object) -> list[Path]:
        """One readable sbatch file for each cell, for users who submit by hand; nothing is tracked.

        A cell's file trains and measures it, and puts itself back into the queue when it was told to leave.
        """
        out = []
        for cell in {cell.id: cell for cell in cells}.values():
            work = Work(TRAIN if cell.config.method.trains else EVALUATE, cell)
            out.append(folder.resolve() / f"{cell.name}.sbatch")
            atomic_write(out[-1], self._job_file(work, self._resources(work, changes), out[-1]))
        return out

    def _job_file(self, work: Work, resources: Resources, file: Path) -> str:
        log, command = log_of(self.runs_dir, work.key), self.command(work, resources, whole=True)
        parameters = slurm_parameters(self.profile, resources, f"fewstep-{work.cell.name}", self.code)
        setup, srun = parameters.pop("setup"), parameters.pop("srun_args", [])
        options = [
            line for line in _sbatch_text(parameters, self.ledger.job_folder, "").splitlines() if "#SBATCH" in line
        ]
        options = [line for line in options if line.partition("=")[0].split("--")[1] not in SUBMITITS_OWN]
        environment = {**ALLOCATOR, **job_environment(resources.cpus_per_process)}
        parents = ", ".join(work.cell.parents)
        return "\n".join(
            [
                "#!/bin/bash",
                f"# {self.grid}, {work.cell.name}: run {work.cell.id}",
                *([f"# Submit it with --dependency=afterok:JOB of run {parents}, its parent."] if parents else []),
                *options,
                f"#SBATCH --output={file.with_suffix('.out')}",
                *setup,
                *(f"export {key}={value}" for key, value in environment.items()),
                f"srun {shlex.join([*srun, self.python, '-m', 'ablations.job', str(log), *command])}",
                "code=$?",
                "# Told to leave, its state saved: back into the queue.",
                f"if [ $code -eq {EXIT_CODE} ]; then scontrol requeue $SLURM_JOB_ID; fi",
                "exit $code",
                "",
            ]
        )

    def sbatch_text(self, array: Array) -> str:
        """The file that would be submitted."""
        self._ids[array] = f"<id of the {array.kind} array>"
        parameters = slurm_parameters(
            self.profile, array.resources, f"fewstep-{self.grid}", self.code, self.after(array), self.bad_nodes
        )
        if len(array.tasks) > 1:
            parameters["map_count"] = len(array.tasks)
        return _sbatch_text(
            parameters, self.ledger.job_folder, f"{self.python} -u -m submitit.core._submit {self.ledger.job_folder}"
        )


def _sbatch_text(parameters: Mapping[str, Any], folder: Path, command: str) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(command=command, folder=folder, **parameters)


def _tasks(works: Sequence[Work], resources: Resources) -> list[tuple[Work, ...]]:
    """The work of each task: packs of one base, or as many cells as share a job."""
    if resources.pack == 1:
        size = resources.cells_per_job
        return [tuple(works[i : i + size]) for i in range(0, len(works), size)]
    by_id = {work.cell.id: work for work in works}
    tasks = []
    for pack in packs_of([work.cell for work in works], resources.pack):
        tasks.append(tuple(by_id[cell.id] for cell in pack))
    return tasks


def _older(first: Sequence[tuple[Submission, str]] | None, second: Sequence[tuple[Submission, str]]) -> bool:
    return first is None or first[-1][0].created < second[-1][0].created


def slurm_parameters(
    profile: Profile, resources: Resources, name: str, code: Path, after: str = "", exclude: Sequence[str] = ()
) -> dict[str, Any]:
    """submitit's parameters: the site's options, the run's resources, and the code that the job imports.

    ``after``: sbatch's dependency; if one of its jobs fails, this job is taken out of the queue.
    """
    more = {"requeue": True, **({"kill-on-invalid-dep": "yes"} if after else {}), **profile.sbatch}
    values: dict[str, Any] = {
        "job_name": name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join(dict.fromkeys([*profile.exclude, *exclude])) or None,
        "time": profile.time_min,
        "signal_delay_s": profile.signal_s,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.processes_per_node,
        "cpus_per_task": resources.cpus_per_process,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": f"{resources.job_gb}GB",
        "array_parallelism": profile.max_parallel,
        "setup": [*profile.setup_lines, f"export PYTHONPATH={shlex.quote(str(code))}", f"cd {shlex.quote(str(code))}"],
        "srun_args": profile.srun,
        "dependency": after or None,
        "additional_parameters": more,
    }
    return {key: value for key, value in values.items() if value not in (None, [])}


def absolute(override: str) -> str:
    """The override with an absolute path in place of an existing relative one: jobs start in the folder of the code."""
    key, _, value = override.partition("=")
    path = Path(value.strip("\"'"))
    if not key.endswith(("path", "init_from")) or path.is_absolute() or not path.exists():
        return override
    return f"{key}={json.dumps(str(path.resolve()))}"


def said(error: BaseException) -> str:
    """sbatch's own words, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if "sbatch: " in line]
    return "; ".join(line.partition("sbatch: ")[2] for line in lines) or str(error).strip().splitlines()[0]
