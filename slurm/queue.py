"""The status of jobs as SLURM tells it: the accounting database, the controller, or the file of completed jobs."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from core.schema import UserError

ALIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED", "RESIZING", "STAGE_OUT")
NOWHERE = ("", "(null)", "None assigned")
THE_REST = str(2**32 - 2)  # NO_VAL, as the index of all tasks that had no record of their own
_FIELD = re.compile(r"(\w+)=(.*?)(?= \w+(?::\w+)*=|$)")


@dataclass(frozen=True)
class JobStatus:
    """Everything that SLURM tells of a task. ``state`` is its word without remarks; ``restarts`` counts requeues."""

    task: str
    name: str
    state: str
    node: str = ""
    reason: str = ""
    restarts: int = 0

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


class Queue:
    """Asks SLURM and changes nothing. Each command may take ``timeout_s``; a busy controller is asked again."""

    pauses_s = (1.0, 5.0, 10.0)

    def __init__(self, timeout_s: float = 30.0) -> None:
        self.timeout_s = timeout_s

    def answers(self) -> bool:
        """Whether SLURM is on this machine, and its controller is up."""
        try:
            return self._ask(["scontrol", "ping"]) is not None
        except UserError:
            return False

    def statuses(self, jobs: Iterable[str]) -> dict[str, JobStatus]:
        """Statuses by task id, the controller's before those of others; a task that nobody knows any more is absent."""
        asked = set(jobs)
        if not asked:
            return {}
        arrays = sorted({job.partition("_")[0] for job in asked})
        found = self._accounting(["-j", ",".join(arrays)]) | self._controller()
        known = {}
        for task in asked:
            status = found.get(task) or _rest(task, found)
            if status is not None:
                known[task] = status
        return known

    def alive(self, jobs: Iterable[str]) -> list[str]:
        """Ids of the tasks among ``jobs`` that wait or run, each once, in their order."""
        asked = list(dict.fromkeys(jobs))
        known = self.statuses(asked)
        return [task for task in asked if task in known and known[task].alive]

    def by_name(self, name: str) -> str | None:
        """The id of the job or array of this name; None when SLURM has never seen it."""
        found = self._accounting(["--name", name]) | self._controller()
        ids = {task.partition("_")[0] for task, status in found.items() if status.name == name}
        return min(ids, default=None)

    def max_array_size(self) -> int:
        """The largest number of tasks that one array may have."""
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", self._of_scontrol("show", "config"), re.MULTILINE)
        if found is None:
            raise UserError("scontrol show config: the controller does not answer")
        return int(found[1])

    def _controller(self) -> dict[str, JobStatus]:
        """Everything that the controller still remembers."""
        text = self._of_scontrol("show", "job", "-a", "-o")
        found = {}
        for line in text.splitlines():
            if "JobId=" in line:
                found |= {status.task: status for status in _of_controller(line)}
        return found

    def _of_scontrol(self, *words: str) -> str:
        """Output of scontrol; UserError when the controller does not answer. Perhaps nobody else knows of a running
        job, and without an answer it would be called lost."""
        text = self._ask(["scontrol", *words])
        for pause in self.pauses_s:
            if text is not None:
                break
            time.sleep(pause)
            text = self._ask(["scontrol", *words])
        if text is None:
            raise UserError(f"scontrol {' '.join(words[:2])}: the controller does not answer; try again when it does")
        return text

    def _accounting(self, which: list[str]) -> dict[str, JobStatus]:
        """``sacct``, or what it reads from the file of completed jobs where there is no database."""
        fields = "JobID,JobName,State,NodeList"
        text = self._ask(["sacct", "-X", "-n", "-P", "-S", "2000-01-01", "-o", fields, *which])
        if text is None:
            text = self._ask(["sacct", "-c", "-n", "-P", "-o", fields])
        out = {}
        for line in (text or "").splitlines():
            parts = line.split("|")
            if len(parts) >= 4:
                job, name, state, node = parts[:4]
                node = "" if node in NOWHERE else node
                out |= {task: JobStatus(task, name, _word(state), node) for task in _tasks(*job.partition("_")[::2])}
        return out

    def _ask(self, words: list[str]) -> str | None:
        """Output, or None when the command fails (no database, no controller)."""
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=self.timeout_s)
        except FileNotFoundError:
            raise UserError(f"{words[0]} is not on this machine; submit from a login node of the cluster") from None
        except subprocess.TimeoutExpired:
            return None
        return done.stdout if done.returncode == 0 else None


class NoQueue(Queue):
    """A queue where no SLURM answers, for dry runs: nothing is known of any job, and arrays are as long as usual."""

    def statuses(self, jobs: Iterable[str]) -> dict[str, JobStatus]:
        return {}

    def by_name(self, name: str) -> str | None:
        return None

    def max_array_size(self) -> int:
        return 1001  # SLURM's own default


def _rest(task: str, found: Mapping[str, JobStatus]) -> JobStatus | None:
    """The array's status for a task that was cancelled with it before it had a record of its own."""
    array = found.get(task.partition("_")[0])
    if array is None or array.state != "CANCELLED" or array.node:
        return None
    return replace(array, task=task)


def _word(state: str) -> str:
    """``CANCELLED by 0`` is CANCELLED."""
    return state.split()[0].rstrip("+") if state.strip() else "UNKNOWN"


def _of_controller(line: str) -> list[JobStatus]:
    """One line of scontrol; a pending array is one line for many tasks (``ArrayTaskId=3-7,9%4``)."""
    fields = dict(_FIELD.findall(line))
    job = fields.get("ArrayJobId", fields["JobId"])
    common = {
        "name": fields.get("JobName", ""),
        "state": _word(fields.get("JobState", "")),
        "node": "" if fields.get("NodeList", "") in NOWHERE else fields["NodeList"],
        "reason": fields.get("Reason", "").replace("None", ""),
        "restarts": int(fields.get("Restarts", "0") or 0),
    }
    return [JobStatus(task=task, **common) for task in _tasks(job, fields.get("ArrayTaskId", ""))]


def _tasks(job: str, indices: str) -> list[str]:
    """``3-7,9%4``, in brackets or not, as tasks of the array; none or SLURM's mark for the rest is the array itself."""
    if indices in ("", THE_REST):
        return [job]
    out: list[str] = []
    for part in indices.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        out.extend(f"{job}_{index}" for index in range(int(first), int(last or first) + 1))
    return out
