"""What SLURM says of jobs: the accounting database, else the controller, else the file of completed jobs."""

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
class JobState:
    """One array task. ``state`` is SLURM's word without its remarks; ``restarts`` counts requeues."""

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
    """Read-only questions; ``timeout_s`` for each command, which a busy controller is asked again after pauses."""

    pauses_s = (1.0, 5.0, 10.0)

    def __init__(self, timeout_s: float = 30.0) -> None:
        self.timeout_s = timeout_s

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        """By task id; a task that nobody knows any more is absent. The controller's word is the newest."""
        asked = set(jobs)
        wanted = sorted({job.partition("_")[0] for job in asked})
        if not wanted:
            return {}
        found = self._accounting(["-j", ",".join(wanted)]) | self._controller()
        return {task: state for task in asked if (state := found.get(task) or _rest(task, found))}

    def by_name(self, name: str) -> str | None:
        """The id of the job of this name, its array's without the task; None when SLURM has never seen it."""
        states = {**self._accounting(["--name", name]), **self._controller()}
        ids = {task.partition("_")[0] for task, state in states.items() if state.name == name}
        return min(ids, default=None)

    def max_array_size(self) -> int:
        """Tasks that one array may have."""
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", self._of_scontrol("show", "config"), re.MULTILINE)
        if found is None:
            raise UserError("scontrol show config: the controller does not answer")
        return int(found[1])

    def _controller(self) -> dict[str, JobState]:
        """Everything that the controller still remembers."""
        text = self._of_scontrol("show", "job", "-a", "-o")
        found = [_of_controller(line) for line in text.splitlines() if "JobId=" in line]
        return {state.task: state for job in found for state in job}

    def _of_scontrol(self, *words: str) -> str:
        """UserError when the controller does not answer: of a job that runs nobody else may know, and it would be
        called lost."""
        text = self._ask(["scontrol", *words])
        for pause in self.pauses_s:
            if text is not None:
                break
            time.sleep(pause)
            text = self._ask(["scontrol", *words])
        if text is None:
            raise UserError(f"scontrol {' '.join(words[:2])}: the controller does not answer; try again when it does")
        return text

    def _accounting(self, which: list[str]) -> dict[str, JobState]:
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
                out |= {task: JobState(task, name, _word(state), node) for task in _tasks(*job.partition("_")[::2])}
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


def _rest(task: str, found: Mapping[str, JobState]) -> JobState | None:
    """Tasks that were cancelled before they had a record of their own share that of their array."""
    state = found.get(task.partition("_")[0])
    return replace(state, task=task) if state and state.state == "CANCELLED" and not state.node else None


def _word(state: str) -> str:
    """``CANCELLED by 0`` is CANCELLED."""
    return state.split()[0].rstrip("+") if state.strip() else "UNKNOWN"


def _of_controller(line: str) -> list[JobState]:
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
    return [JobState(task=task, **common) for task in _tasks(job, fields.get("ArrayTaskId", ""))]


def _tasks(job: str, indices: str) -> list[str]:
    """``3-7,9%4``, in brackets or not, as tasks of the array; none or SLURM's mark for the rest is the array itself."""
    if indices in ("", THE_REST):
        return [job]
    out: list[str] = []
    for part in indices.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        out.extend(f"{job}_{index}" for index in range(int(first), int(last or first) + 1))
    return out
