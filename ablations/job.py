"""A cell's command with its log, as every job starts it; and the inside of a job on a cluster. Torch-free.

submitit owns requeueing. When the job is told to leave (preemption, time limit), the trainings save their state and end
with EXIT_CODE; then submitit requeues the job, once, and the same commands go on where they were.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.training.preemption import EXIT_CODE
from experiments.attempts import heading

POLL_S = 0.2


@dataclass
class CellsJob:
    """The cells of one job; several share its device, each with its own log and its own failure.

    ``commands``: (log file, command) of each cell. ``save_s``: seconds that the trainings may take to save their state;
    the job is requeued anyway. submitit pickles this callable: it holds texts and numbers alone.
    """

    commands: list[tuple[str, list[str]]]
    environment: dict[str, str] = field(default_factory=dict)
    save_s: float = 90.0
    _children: list[subprocess.Popen] = field(default_factory=list, repr=False)

    def __call__(self) -> list[int]:
        """Run the commands to their ends; returns their exit codes. RuntimeError, which SLURM shows, when all failed.

        Where one of several cells has failed, its own run says so: what depends on the others must not wait.
        """
        environment = {**os.environ, **self.environment, **launcher(os.environ)}
        for log, command in self.commands:
            self._children.append(start(Path(log), command, environment))
        while any(child.poll() is None for child in self._children):
            time.sleep(POLL_S)  # not wait(): it holds a lock that the signal's handler would need
        codes = [child.returncode for child in self._children]
        if {EXIT_CODE, -signal.SIGUSR2} & set(codes):  # a measurement knows no signals; it goes on where it was
            self._await_requeue()
        if all(codes):
            raise RuntimeError(f"failed: {', '.join(Path(log).name for log, _ in self.commands)}")
        return codes

    def _await_requeue(self) -> None:
        """Wait for this process's own handler, which requeues the job: the children have heard the signal first."""
        time.sleep(self.save_s)
        raise RuntimeError("stopped with the state saved, but this job was not told to leave; `fewstep grid retry`")

    def checkpoint(self) -> object:
        """Called by submitit when the job must leave: let the trainings save, then give the same job again."""
        from submitit.helpers import DelayedSubmission

        pids = [child.pid for child in self._children]
        end = time.monotonic() + self.save_s
        for pid in filter(_runs, pids):
            os.kill(pid, signal.SIGUSR2)
        while any(map(_runs, pids)) and time.monotonic() < end:
            time.sleep(POLL_S)
        return DelayedSubmission(CellsJob(self.commands, self.environment, self.save_s))


def _runs(pid: int) -> bool:
    """Whether a child is running; asked without Popen, whose lock the interrupted code may hold."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def start(
    log: Path, command: Sequence[str], environment: Mapping[str, str], inherited: Sequence[int] = ()
) -> subprocess.Popen:
    """Start a command; rank 0 writes the cell's log, the others' output is in the job's own.

    ``inherited``: descriptors that the process keeps open.
    """
    if int(environment.get("RANK", "0")):
        return subprocess.Popen(command, env=dict(environment))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        stream.write(heading(environment))
        stream.flush()
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
        )


def launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables from those of srun; nothing for a job of one process.

    The address is that of the node that launched the step, the job's first; the port follows from the job's id, so
    that two jobs on one node do not meet.
    """
    size = int(environment.get("SLURM_NTASKS", "1"))
    if size == 1 or "SLURM_PROCID" not in environment:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }


def main(argv: Sequence[str]) -> int:
    """``python -m ablations.job LOG COMMAND...``: one cell, from an sbatch file without submitit."""
    log, *command = argv
    environment = {**os.environ, **launcher(os.environ)}
    child = start(Path(log), command, environment)
    signal.signal(signal.SIGUSR2, lambda *_: child.send_signal(signal.SIGUSR2))
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
