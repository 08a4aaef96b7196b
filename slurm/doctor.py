"""``fewstep doctor``: whether a cluster is as submission needs it, and in one line each what to change."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from core.schema import UserError
from slurm.probe import Report
from slurm.profile import Profile
from slurm.queue import Queue
from slurm.resources import Resources
from slurm.submit import MOST_TASKS, said, slurm_parameters

PROBE_S = 300.0  # for a job to come out of the queue and answer
SIGNAL_LEAD_S = 60  # a big state takes about as long to save
COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "sinfo")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. ``ok`` None: it works, but less well than it could."""

    ok: bool | None
    text: str

    def __str__(self) -> str:
        return f"{ {True: 'ok   ', None: 'note ', False: 'FAIL '}[self.ok] } {self.text}"


def examine(profile: Profile, runs_dir: Path, code: Path) -> Iterator[Finding]:
    """Yield findings, the cheap ones first; the last ones come from a job of two processes on the cluster itself."""
    if profile.executor != "slurm":
        yield Finding(True, f"executor {profile.executor}: this machine is used, no cluster")
        return
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        yield Finding(False, f"{', '.join(missing)} not found: run this on a login node of the cluster")
        return
    site = _Site(profile)
    if not site.config:
        yield Finding(False, "scontrol show config: the controller does not answer; is SLURM_CONF right?")
        return
    checks: list[Callable[[], Iterator[Finding]]] = [
        site.accounting, site.arrays, site.requeueing, site.signals, site.partition, site.nodes
    ]  # fmt: skip
    for check in checks:
        yield from check()
    if site.fitting:
        yield from probe(profile, profile.shared(runs_dir), code, min(2, site.fitting))


class _Site:
    """The controller's own account of its cluster."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.fitting = 0  # nodes that hold what the profile says; known after ``nodes``

    @cached_property
    def config(self) -> dict[str, str]:
        lines = _ask(["scontrol", "show", "config"]).splitlines()
        return {key.strip(): value.strip() for key, found, value in (line.partition("=") for line in lines) if found}

    @cached_property
    def shown(self) -> dict[str, str]:
        """The partition."""
        name = self.profile.partition
        text = _ask(["scontrol", "-o", "show", "partition", *([name] if name else [])])
        lines = [line for line in text.splitlines() if name or "Default=YES" in line]
        return dict(re.findall(r"(\w+)=(\S*)", lines[0])) if lines else {}

    def accounting(self) -> Iterator[Finding]:
        if _ask(["sacct", "-n", "-X", "-S", "now"], none="!") != "!":
            yield Finding(True, "sacct answers")
        elif "jobcomp" in self.config.get("JobCompType", ""):
            yield Finding(None, "no accounting: states come from the controller and the file of completed jobs")
        else:
            yield Finding(None, "no accounting, no JobCompType: what failed MinJobAge ago shows as lost")

    def arrays(self) -> Iterator[Finding]:
        most = int(self.config.get("MaxArraySize", "0"))
        if most < 2:
            yield Finding(False, f"MaxArraySize={most}: arrays are switched off; set it to {MOST_TASKS + 1}")
        elif most < MOST_TASKS:
            yield Finding(None, f"MaxArraySize={most}: larger grids are submitted as several arrays")
        else:
            yield Finding(True, f"MaxArraySize={most}")

    def requeueing(self) -> Iterator[Finding]:
        mode = self.shown.get("PreemptMode", self.config.get("PreemptMode", "OFF"))
        if mode.startswith("CANCEL"):
            yield Finding(None, f"PreemptMode={mode}: preempted jobs are not requeued by SLURM; submitit does it")
        else:
            yield Finding(True, f"PreemptMode={mode}; jobs ask for --requeue themselves")

    def signals(self) -> Iterator[Finding]:
        if "preempt_send_user_signal" in self.config.get("SlurmctldParameters", ""):
            yield Finding(True, "a preempted job gets its signal early (preempt_send_user_signal)")
        else:
            grace = self.shown.get("GraceTime", "0")
            text = f"SlurmctldParameters lacks preempt_send_user_signal: a preempted job has GraceTime ({grace} s)"
            yield Finding(None, f"{text} to save; else it goes on from its last checkpoint")
        if self.profile.signal_s < SIGNAL_LEAD_S:
            text = f"signal_s={self.profile.signal_s} of the profile"
            yield Finding(None, f"{text}: a large state may not be saved in time; 120 is usual")

    def partition(self) -> Iterator[Finding]:
        name = self.profile.partition
        if not self.shown:
            every = " ".join(re.findall(r"PartitionName=(\S+)", _ask(["scontrol", "-o", "show", "partition"])))
            what = f"partition {name} does not exist" if name else "there is no default partition; name one"
            yield Finding(False, f"{what}; there are: {every}")
            return
        limit = _minutes(self.shown.get("MaxTime", "UNLIMITED"))
        if limit is not None and limit < self.profile.time_min:
            text = f"time_min={self.profile.time_min} exceeds the partition's MaxTime of {limit} minutes; lower it"
            yield Finding(False, text)
        else:
            yield Finding(True, f"partition {self.shown['PartitionName']} allows {self.profile.time_min} minutes")

    def nodes(self) -> Iterator[Finding]:
        if not self.shown:
            return
        asked, lines = self.profile, _ask(["sinfo", "-h", "-p", self.shown["PartitionName"], "-o", "%D|%c|%m|%G|%T"])
        down = 0
        for line in lines.splitlines():
            count, cpus, memory, gres, state = line.split("|")
            gpus = sum(map(int, re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres)))
            enough = (
                int(cpus.rstrip("+")) >= asked.cpus_per_node
                and int(memory.rstrip("+")) >= 1000 * asked.mem_gb_per_node
                and gpus >= asked.gpus_per_node
            )
            self.fitting += int(count) * enough
            down += int(count) * (enough and state.startswith(("down", "drain", "fail")))
        words = f"{asked.cpus_per_node} CPUs, {asked.mem_gb_per_node} GB, {asked.gpus_per_node} GPUs"
        if self.fitting == 0:
            yield Finding(False, f"no node of the partition has the profile's {words}; see sinfo -o '%N %c %m %G'")
        else:
            away = f", {down} of them down" if down else ""
            yield Finding(True if down < self.fitting else None, f"{self.fitting} nodes with {words}{away}")


def probe(profile: Profile, shared: Path, code: Path, nodes: int) -> Iterator[Finding]:
    """Yield what a job with one process on each of ``nodes`` finds: folder, Python, devices, a ping between them."""
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    token = uuid.uuid4().hex
    folder = shared / "doctor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).write_text(token)
    except OSError as error:
        yield Finding(False, f"{shared} cannot be written here ({error.strerror}); set shared_dir in the profile")
        return
    yield Finding(True, f"{shared} can be written here")
    gpus = min(profile.gpus_per_node, 1)
    resources = Resources(nodes=nodes, gpus_per_process=gpus, mem_gb=min(4, profile.mem_gb_per_node))
    parameters = slurm_parameters(profile, resources, "fewstep-doctor", code) | {"time": min(15, profile.time_min)}
    executor = SlurmExecutor(folder, python=profile.python)
    executor.update_parameters(**parameters)
    try:
        job = executor.submit(Report(str(folder / token), token, gpus))
    except FailedJobError as error:
        yield Finding(False, f"sbatch refuses a job of {nodes} nodes: {said(error)}")
        return
    yield from _answers(job, folder, nodes)
    (folder / token).unlink(missing_ok=True)


def _answers(job: Any, folder: Path, nodes: int) -> Iterator[Finding]:
    from submitit.core.utils import JobPaths

    name = f"the probe (job {job.job_id}, log {folder}/{job.job_id}_0_log.err)"
    end, alive = time.monotonic() + PROBE_S, True
    while alive and time.monotonic() < end:
        time.sleep(1)
        found = Queue().statuses([job.job_id]).get(job.job_id)
        alive = found is None or found.alive
    if alive:
        job.cancel()
        yield Finding(False, f"{name} did not run within {PROBE_S:.0f} s")
        return
    for process in range(nodes):
        paths = JobPaths(folder, job.job_id, process)
        if not paths.result_pickle.exists():  # asking submitit for it would wait for ever where there is no accounting
            yield Finding(False, f"{name} gave no answer: {_complaint(paths.stderr)}")
            return
        outcome, report = pickle.loads(paths.result_pickle.read_bytes())
        if outcome == "error":
            yield Finding(False, f"{name} failed: {report.strip().splitlines()[-1]}")
            return
        yield from (Finding(ok, f"{report['host']}: {text}") for ok, text in report["findings"])


def _complaint(log: Path) -> str:
    """The first line that says more than which process has ended."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line for line in lines if "error: " in line and "Exited with" not in line), "its log is empty")


def _minutes(text: str) -> int | None:
    """SLURM's ``1-02:03:04`` in minutes; None: no limit."""
    if text in ("UNLIMITED", "INFINITE", "NONE", ""):
        return None
    days, _, clock = text.rpartition("-")
    hours, minutes, *_ = [*map(int, clock.split(":"))]
    return 24 * 60 * int(days or 0) + 60 * hours + minutes


def _ask(words: list[str], none: str = "") -> str:
    """Output; ``none`` when the command fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(words)} did not answer within 60 s") from None
    return done.stdout if done.returncode == 0 else none
