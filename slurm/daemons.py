"""Processes of the local cluster: starting, finding by pid file or by node, waiting, stopping."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from core.schema import UserError


def processes_of(node: str, conf: Path) -> list[int]:
    """Processes of jobs on ``node`` of the cluster with this slurm.conf; their environment names both."""
    marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={conf}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marks <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def step_daemon(pid: int) -> int | None:
    """The slurmstepd above a job's process, which would report that process's death; None when it is gone."""
    while pid > 1:
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            return None
        if name.startswith("slurmstepd"):
            return pid
        pid = int(rest.split()[1])
    return None


def alive(pid: int, name: str) -> bool:
    """Whether ``pid`` is still the daemon ``name`` and not another process that has got its number."""
    program = name.partition(".")[0]
    try:
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return comm.startswith(program[:15]) and state != "Z"


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run(words: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise UserError(f"{words[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


def succeeds(words: Sequence[str], environment: dict[str, str] | None = None) -> bool:
    return subprocess.run(words, env=environment, capture_output=True, timeout=60).returncode == 0


def wait(holds: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            raise UserError(f"local cluster: {complaint} (waited {timeout_s:.0f} s)")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
