"""Cluster profiles: what a site wants in its sbatch files. YAML, by name (slurm/clusters/) or by path."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from ablations.work import job_root
from core.config import read_yaml
from core.schema import UserError, check_choice, check_range, nearest

FOLDER = Path(__file__).parent / "clusters"
OWN_FOLDER = Path("~/.config/fewstep/clusters")  # a user's own profiles, found by name too
EXECUTORS = ("slurm", "local", "debug")
# At a limit of ten minutes or less submitit takes every signal for a time-out, and gives up after a few.
SHORTEST_MIN = 11
SHORTEST_SAVE_S = 30.0  # SLURM's usual KillWait: after the limit a job has it anyway
_SHELL_SAFE = re.compile(r"[\w.,:=@+/\[\]~%&|!*-]*")


@dataclass
class Profile:
    """Options of one cluster; where they are empty or null, the site's own defaults hold."""

    description: str = ""
    executor: str = "slurm"  # slurm | local: processes on this machine | debug: inside this process
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 0
    cpus_per_node: int = 1
    mem_gb_per_node: int = 4
    time_min: int = 24 * 60  # wall limit of a job; it is requeued and goes on when it needs more
    signal_s: int = 120  # how long before the limit a job is told, so that it can save its state; more for a large one
    max_parallel: int = 64  # tasks of one array at a time
    container: str | None = None  # of srun --container-image (pyxis)
    modules: list[str] = field(default_factory=list)  # loaded in front of every job
    setup: list[str] = field(default_factory=list)  # shell lines in front of every job
    srun_args: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)  # nodes
    failures_per_node: int = 2  # a node with more, while none of its cells ended well, is left out
    sbatch: dict[str, str] = field(default_factory=dict)  # further options: {"reservation": "mine"}
    python: str | None = None  # interpreter on the nodes; null: the one that submits
    shared_dir: str | None = None  # seen by every node: code snapshots and job files; null: beside the runs

    def validate(self) -> None:
        """Raise UserError for the first value that is not allowed."""
        check_choice("executor", self.executor, EXECUTORS)
        for key in ("partition", "account", "qos", "constraint", "container", "python"):
            check_shell_safe(key, getattr(self, key))
        for key in ("modules", "exclude"):
            for value in getattr(self, key):
                check_shell_safe(key, value)
        for key, value in self.sbatch.items():
            check_shell_safe("sbatch", key)
            check_shell_safe(f"sbatch.{key}", value)
        for line in self.setup:
            if "\n" in line:
                raise UserError("setup: a line contains a line break; give one list entry for each line")
        check_range("gpus_per_node", self.gpus_per_node, 0)
        check_range("cpus_per_node", self.cpus_per_node, 1)
        check_range("mem_gb_per_node", self.mem_gb_per_node, 1)
        check_range("max_parallel", self.max_parallel, 1)
        check_range("failures_per_node", self.failures_per_node, 0)
        check_range("signal_s", self.signal_s, 10)
        check_range("time_min", self.time_min, SHORTEST_MIN)
        if self.signal_s >= 60 * self.time_min:
            raise UserError(f"signal_s={self.signal_s} is not shorter than time_min={self.time_min} minutes")

    def shared(self, runs_dir: Path) -> Path:
        """The folder that every node sees; beside the runs where the site names none."""
        return Path(self.shared_dir or job_root(runs_dir)).resolve()

    @property
    def save_s(self) -> float:
        """Seconds that the trainings of a job have to save; the rest of ``signal_s`` is for requeueing it in time."""
        return max(SHORTEST_SAVE_S, 0.75 * self.signal_s)

    @property
    def setup_lines(self) -> list[str]:
        """Shell lines in front of the job's command."""
        return [*(f"module load {shlex.quote(name)}" for name in self.modules), *self.setup]

    @property
    def srun(self) -> list[str]:
        return [*([f"--container-image={self.container}"] if self.container else []), *self.srun_args]


def check_shell_safe(key: str, value: str | None) -> None:
    """Raise UserError for quotes, spaces or line breaks in a name that goes into a shell file."""
    if value is not None and not _SHELL_SAFE.fullmatch(value):
        raise UserError(
            f"{key}={value!r} has characters that a job file cannot hold; allowed: letters, digits, .,:=@+/-_"
        )


def names() -> list[str]:
    """Profiles that are found by name."""
    folders = (FOLDER, OWN_FOLDER.expanduser())
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def load(name: str) -> Profile:
    """A profile by name or by the path of a YAML file; UserError names the file and the key."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else None
    for folder in (OWN_FOLDER.expanduser(), FOLDER) if path is None else ():
        if (folder / f"{name}.yaml").is_file():
            path = folder / f"{name}.yaml"
            break
    if path is None or not path.is_file():
        known = names()
        raise UserError(f"unknown cluster '{name}'{nearest(name, known)}; all: {', '.join(known)}, or a YAML file")
    try:
        profile = read_yaml(path, Profile, "a cluster profile")
        profile.validate()
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None
    return profile
