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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.schema import UserError
from slurm.daemons import alive, free_ports, processes_of, run, send, step_daemon, succeeds, wait

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
# Clients of a busy machine give up after 10 seconds by default.
MessageTimeout=30
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
    """A cluster on this machine: its folder and its nodes."""

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
        """Environment of a process that talks to this cluster and to no other."""
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
        wait(self._all_idle, START_S, f"the nodes did not become idle; see {self.folder}/log")

    def start_node(self, node: str) -> None:
        """Start the daemon of one node."""
        self._start(f"slurmd.{node}", ["slurmd", "-N", node])

    def stop_node(self, node: str) -> None:
        """Kill the daemon of one node and everything that it runs, as a power cut would: nobody reports anything."""
        self._stop(f"slurmd.{node}", signal.SIGKILL)
        processes = processes_of(node, self.conf)
        for pid in [*(parent for pid in processes if (parent := step_daemon(pid))), *processes]:
            send(pid, signal.SIGKILL)

    def down(self) -> None:
        """Cancel all jobs and stop the daemons that ``up`` has started."""
        if self.is_up():
            self.command(["scancel", "--user=root"], check=False)
            with contextlib.suppress(UserError):
                wait(lambda: not self.command(["squeue", "-h"], check=False).strip(), STOP_S, "")
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
            said = (done.stderr or done.stdout).strip() or f"ends with {done.returncode}"
            raise UserError(f"{' '.join(words)}: {said}")
        return done.stdout

    # --- configuration ------------------------------------------------------------------------------------

    def _write_conf(self) -> None:
        ports = free_ports(self.num_nodes + 2)
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
                f"AccountingStoragePort={ports[-2]}\nAccountingStoragePass={self._munge_socket}"  # so it is called
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
        wait(self._munge_socket.exists, START_S, f"munged did not start; see {folder}/munged.log")

    def _start_accounting(self) -> None:
        data, pids = self.folder / "mariadb", self.folder / "run"
        if not data.exists():
            data.mkdir()
            shutil.chown(data, "mysql", "mysql")
            run(["mariadb-install-db", "--user=mysql", f"--datadir={data}"], self.environment)
        sock = pids / "mysqld.sock"
        pids.chmod(0o777)
        if self._pid("mariadbd") is None:
            words = [
                "mariadbd", "--user=mysql", f"--datadir={data}", f"--socket={sock}", "--skip-networking",
                "--innodb-buffer-pool-size=64M", f"--pid-file={pids}/mariadbd.pid",
                f"--log-error={self.folder}/mariadb/error.log",
            ]  # fmt: skip
            subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            wait(sock.exists, START_S, f"mariadbd did not start; see {data}/error.log")
        SOCKET.parent.mkdir(parents=True, exist_ok=True)
        if not SOCKET.exists():
            SOCKET.unlink(missing_ok=True)
            SOCKET.symlink_to(sock)
        grant = (
            "CREATE DATABASE IF NOT EXISTS slurm_acct_db; CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY"
            " 'fewstep'; GRANT ALL ON slurm_acct_db.* TO slurm@localhost;"
        )
        wait(lambda: succeeds(["mariadb", f"--socket={sock}", "-e", grant]), START_S, "MariaDB refuses the user")
        self._start("slurmdbd", ["slurmdbd"])
        wait(lambda: succeeds(["sacctmgr", "-n", "list", "cluster"], self.environment), START_S, "slurmdbd is silent")
        self.command(["sacctmgr", "-i", "add", "cluster", "fewstep"], check=False)

    def _start(self, name: str, words: Sequence[str]) -> None:
        if self._pid(name) is not None:
            return
        (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)
        run(words, self.environment)
        wait(lambda: self._pid(name) is not None, START_S, f"{name} did not start; see {self.folder}/log")

    def _stop(self, name: str, number: int) -> None:
        pid = self._pid(name)
        if pid is not None:
            send(pid, number)
            with contextlib.suppress(UserError):
                wait(lambda: not alive(pid, name), STOP_S, "")
            if alive(pid, name):
                send(pid, signal.SIGKILL)
        (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)

    def _pid(self, name: str) -> int | None:
        """The living process of a daemon that we have started; None when there is none."""
        try:
            pid = int((self.folder / "run" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if alive(pid, name) else None


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
    """Keep the cluster up for the length of a block."""
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def main(argv: Sequence[str] | None = None) -> int:
    """Start, stop or show the cluster; ``up`` prints the line that points a shell at it."""
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
