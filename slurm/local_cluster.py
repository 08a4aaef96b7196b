"""A real SLURM on one machine, for the tests and for trying submission out: ``python -m slurm.local_cluster up``.

munge, slurmctld and one slurmd for each node, started as root without systemd or cgroups; optionally slurmdbd with
MariaDB. Everything lies in one folder; only processes that ``up`` started are stopped, by their pid files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.schema import UserError

FOLDER = Path("/var/tmp/fewstep-slurm")
PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
ACCOUNTING_PROGRAMS = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}
DAEMONS = ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged")
START_S, STOP_S = 60.0, 20.0

SLURM_CONF = """\
ClusterName=fewstep
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits for its credential to expire: 2 minutes by default.
AuthInfo=cred_expire=15,socket={munge}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
SlurmdTimeout=15
InactiveLimit=0
MinJobAge=3600
MaxArraySize={max_array_size}
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
{accounting}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={munge}
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=fewstep
StorageLoc=slurm_acct_db
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
"""
SOCKET = Path("/run/mysqld/mysqld.sock")  # where slurmdbd looks


@dataclass(frozen=True)
class Cluster:
    """Where a cluster lies and what it looks like."""

    folder: Path = FOLDER
    num_nodes: int = 2
    cpus_per_node: int = 2
    memory_mb: int = 8000
    max_array_size: int = 1001
    accounting: bool = False

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to talk to this cluster and to no other."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    @property
    def nodes(self) -> list[str]:
        return [f"n{index}" for index in range(1, self.num_nodes + 1)]

    def up(self) -> None:
        """Start what does not run yet; returns when all nodes are idle. UserError when that cannot be."""
        _require_root()
        _require(PROGRAMS | (ACCOUNTING_PROGRAMS if self.accounting else {}))
        if self.is_up():
            return
        for name in ("run", "log", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_conf()
        self._start_munge()
        if self.accounting:
            self._start_accounting()
        self._start("slurmctld", ["slurmctld"])
        for node in self.nodes:
            self.start_node(node)
        _wait(self._all_idle, START_S, f"the nodes did not become idle; see {self.folder}/log")

    def start_node(self, node: str) -> None:
        """Start the daemon of one node."""
        self._start(f"slurmd.{node}", ["slurmd", "-N", node])

    def stop_node(self, node: str) -> None:
        """Kill the daemon of one node and everything that it runs, as a power cut would: nobody reports anything."""
        self._stop(f"slurmd.{node}", signal.SIGKILL)
        processes = _processes_of(node)
        for pid in [*(parent for pid in processes if (parent := _step_daemon(pid))), *processes]:
            _signal(pid, signal.SIGKILL)

    def down(self) -> None:
        """Cancel all jobs and stop the daemons that ``up`` has started."""
        if self.is_up():
            self.command(["scancel", "--user=root"], check=False)
            with contextlib.suppress(UserError):
                _wait(lambda: not self.command(["squeue", "-h"], check=False).strip(), STOP_S, "")
        for prefix in DAEMONS:
            for file in sorted((self.folder / "run").glob(f"{prefix}*.pid")):
                self._stop(file.stem, signal.SIGTERM)
        if SOCKET.is_symlink() and Path(os.readlink(SOCKET)).parent == self.folder / "run":
            SOCKET.unlink()

    def is_up(self) -> bool:
        """Whether the controller answers."""
        if not self.conf.exists() or self._pid("slurmctld") is None:
            return False
        return "UP" in self.command(["scontrol", "ping"], check=False)

    def status(self) -> str:
        """One line for each node: its name, state, and processors."""
        if not self.is_up():
            return "down"
        return self.command(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T %c cpus"]).strip()

    def command(self, words: Sequence[str], check: bool = True) -> str:
        """Output of a SLURM command on this cluster."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise UserError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    # --- configuration ------------------------------------------------------------------------------------

    def _write_conf(self) -> None:
        ports = _free_ports(self.num_nodes + 2)
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus_per_node} "
            f"RealMemory={self.memory_mb} State=UNKNOWN"
            for node, port in zip(self.nodes, ports, strict=False)
        ]
        accounting = "AccountingStorageType=accounting_storage/none"
        if self.accounting:
            accounting = (
                "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\n"
                f"AccountingStoragePort={ports[-2]}"
            )
        facts = {"host": host, "folder": self.folder, "munge": self._munge_socket, "dbd_port": ports[-2]}
        self.conf.write_text(
            SLURM_CONF.format(
                **facts,
                controller_port=ports[-1],
                max_array_size=self.max_array_size,
                accounting=accounting,
                nodes="\n".join(nodes),
            )
        )
        if self.accounting:
            file = self.folder / "slurmdbd.conf"
            file.write_text(SLURMDBD_CONF.format(**facts))
            file.chmod(0o600)

    def _all_idle(self) -> bool:
        states = self.command(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], check=False).split()
        return len(states) == self.num_nodes and set(states) == {"idle"}

    # --- daemons ------------------------------------------------------------------------------------------

    @property
    def _munge_socket(self) -> Path:
        return self.folder / "munge" / "munge.socket"

    def _start_munge(self) -> None:
        """A munge of our own with a key of our own: it trusts nobody else's and nobody else's trusts it."""
        folder = self.folder / "munge"
        folder.mkdir(exist_ok=True)
        key = folder / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)
        self.folder.chmod(0o755)
        folder.chmod(0o711)
        options = {
            "key-file": key, "socket": self._munge_socket, "pid-file": self.folder / "run/munged.pid",
            "log-file": folder / "munged.log", "seed-file": folder / "munged.seed",
        }  # fmt: skip
        # --force: the folder below /var/tmp is the user's own, not the system's.
        self._start("munged", ["munged", "--force", *(f"--{key}={value}" for key, value in options.items())])
        _wait(self._munge_socket.exists, START_S, f"munged did not start; see {folder}/munged.log")

    def _start_accounting(self) -> None:
        data, run = self.folder / "mariadb", self.folder / "run"
        if not data.exists():
            data.mkdir()
            shutil.chown(data, "mysql", "mysql")
            _run(["mariadb-install-db", "--user=mysql", f"--datadir={data}"], self.environment)
        sock = run / "mysqld.sock"
        run.chmod(0o777)
        if self._pid("mariadbd") is None:
            words = [
                "mariadbd", "--user=mysql", f"--datadir={data}", f"--socket={sock}", "--skip-networking",
                "--innodb-buffer-pool-size=64M", f"--pid-file={run}/mariadbd.pid",
                f"--log-error={self.folder}/mariadb/error.log",
            ]  # fmt: skip
            subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            _wait(sock.exists, START_S, f"mariadbd did not start; see {data}/error.log")
        SOCKET.parent.mkdir(parents=True, exist_ok=True)
        if not SOCKET.exists():
            SOCKET.unlink(missing_ok=True)
            SOCKET.symlink_to(sock)
        grant = (
            "CREATE DATABASE IF NOT EXISTS slurm_acct_db; CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY"
            " 'fewstep'; GRANT ALL ON slurm_acct_db.* TO slurm@localhost;"
        )
        _wait(lambda: _succeeds(["mariadb", f"--socket={sock}", "-e", grant]), START_S, "MariaDB refuses the user")
        environment = self.environment | {"SLURM_CONF": str(self.conf)}
        (self.folder / "slurmdbd.conf").chmod(0o600)
        self._start("slurmdbd", ["slurmdbd"], environment)
        _wait(lambda: _succeeds(["sacctmgr", "-n", "list", "cluster"], self.environment), START_S, "slurmdbd is silent")
        self.command(["sacctmgr", "-i", "add", "cluster", "fewstep"], check=False)

    def _start(self, name: str, words: Sequence[str], environment: dict[str, str] | None = None) -> None:
        if self._pid(name) is not None:
            return
        (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)
        _run(words, environment or self.environment)
        _wait(lambda: self._pid(name) is not None, START_S, f"{name} did not start; see {self.folder}/log")

    def _stop(self, name: str, number: int) -> None:
        pid = self._pid(name)
        if pid is not None:
            _signal(pid, number)
            with contextlib.suppress(UserError):
                _wait(lambda: not _alive(pid, name), STOP_S, "")
            if _alive(pid, name):
                _signal(pid, signal.SIGKILL)
        (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)

    def _pid(self, name: str) -> int | None:
        """The living process of a daemon that we have started; None when there is none."""
        try:
            pid = int((self.folder / "run" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if _alive(pid, name) else None


def _processes_of(node: str) -> list[int]:
    """Processes of the node's jobs, which carry its name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def _step_daemon(pid: int) -> int | None:
    """The slurmstepd above a job's process: it would report the process's death."""
    while pid > 1:
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            return None
        if name.startswith("slurmstepd"):
            return pid
        pid = int(rest.split()[1])
    return None


def _alive(pid: int, name: str) -> bool:
    """Whether ``pid`` is still the daemon ``name`` and not another process that has got its number."""
    program = name.partition(".")[0]
    try:
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return comm.startswith(program[:15]) and state != "Z"


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _run(words: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise UserError(f"{words[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


def _succeeds(words: Sequence[str], environment: dict[str, str] | None = None) -> bool:
    return subprocess.run(words, env=environment, capture_output=True, timeout=60).returncode == 0


def _wait(holds: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            raise UserError(f"local cluster: {complaint} (waited {timeout_s:.0f} s)")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _require_root() -> None:
    if os.geteuid():
        raise UserError("local cluster: slurmd and munged need root here; run it as root, e.g. in a container")


def _require(programs: dict[str, str]) -> None:
    """UserError with the install command when a program is missing."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if missing:
        packages = " ".join(dict.fromkeys(programs[name] for name in missing))
        raise UserError(
            f"local cluster: {', '.join(missing)} not found; on Debian or Ubuntu: apt-get install -y {packages}"
        )


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster for the length of a block."""
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()


def main(argv: Sequence[str] | None = None) -> int:
    """``up`` prints the line that points a shell at the cluster."""
    parser = argparse.ArgumentParser(prog="python -m slurm.local_cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("up", "down", "status"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB")
    arguments = parser.parse_args(argv)
    cluster = Cluster(arguments.folder.resolve(), arguments.nodes, accounting=arguments.accounting)
    try:
        if arguments.action == "down":
            cluster.down()
        elif arguments.action == "up":
            cluster.up()
            print(f"export SLURM_CONF={cluster.conf}")
        print(cluster.status())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
