"""A run: its folder, its attempts, its records, and its state, which is read from files alone. Torch-free.

``runs/<experiment>/<label>-<id>/`` holds config.yaml, provenance.json, attempts/, metrics.jsonl, evals.jsonl,
heartbeat.json and what the trainer adds (samples/, snapshots/, state/, log.txt). The same configuration has
the same id, hence the same folder, whatever its label: it resumes. Files appear complete or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import msgspec

from core.config import ExperimentConfig, UserError, from_yaml, run_id, to_yaml
from core.measured import KEY, Number, read_numbers
from core.provenance import provenance

END_STATES = ("done", "failed", "diverged", "stopped")
KILLED = "interrupted; the same command goes on from its last checkpoint"
_SYNCED_AT_ONCE = 16  # a disk writes many small files together in a fraction of the time of one after the other
_LOCK_TRIES = 10  # a reader that asks for the state holds the lock for microseconds


def atomic_write(path: Path | str, data: str | bytes) -> None:
    """Write ``path`` completely or not at all; UserError when the disk refuses."""
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a folder to fill; it appears at ``path``, replacing an older one, when the block ends without error."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            files = [path for path in temporary.rglob("*") if path.is_file() and not path.is_symlink()]
            with ThreadPoolExecutor(min(len(files), _SYNCED_AT_ONCE) or 1) as pool:
                list(pool.map(_sync_file, files))
            temporary.chmod(0o755)
            if path.exists():  # rename does not replace a filled folder
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                path.rename(old / path.name)
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    path.chmod(0o644)  # safetensors makes files that nobody else can read
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell a full or unwritable disk as a user's mistake."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def find_runs(runs_dir: Path | str) -> Iterator[Path]:
    """All run folders below ``runs_dir``, in the order of their names."""
    return map(Path, _run_folders(str(runs_dir)))


def _run_folders(folder: str) -> Iterator[str]:
    """``find_runs`` as texts. What a run's folder holds is not listed: one question is enough to know it."""
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.lstat(f"{folder}/config.yaml").st_mode):
            yield folder
            return
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:  # not there, or not ours
        return
    for name in names:
        if not name.startswith("."):
            yield from _run_folders(os.path.join(folder, name))


def _find(runs_dir: Path | str, identity: str) -> Path | None:
    return next((path for path in find_runs(runs_dir) if _id_of(path) == identity), None)


def _id_of(path: Path) -> str:
    return path.name.rpartition("-")[2]


@dataclass
class Run:
    """One run's folder."""

    path: Path
    id: str
    _config: ExperimentConfig | None = None
    _holds_lock: bool = False

    @property
    def config(self) -> ExperimentConfig:
        """Its configuration, whose execution part may differ from the stored one; UserError where that is damaged.

        A run that is opened reads it when it is asked for: a status of a thousand runs is not.
        """
        if self._config is None:
            file = self.path / "config.yaml"
            try:
                text = file.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: cannot be read ({error})") from error
            self._config = from_yaml(text, str(file))
        return self._config

    @config.setter
    def config(self, config: ExperimentConfig) -> None:
        self._config = config

    @classmethod
    def create(cls, config: ExperimentConfig) -> Run:
        """The run of a resolved configuration: its existing folder wherever it lies, or a new one."""
        identity, runs_dir = run_id(config), Path(config.execution.runs_dir)
        path = _find(runs_dir, identity)
        if path is None:
            label = config.execution.label
            path = runs_dir / config.name / (f"{label}-{identity}" if label else identity)
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            atomic_write(path / "provenance.json", json.dumps(provenance(config), indent=1) + "\n")
            atomic_write(path / "config.yaml", to_yaml(config))  # last: it makes the folder a run
        else:
            Run.open(path).config  # noqa: B018  a damaged folder is told before anything is computed
        return cls(path, identity, config)

    @classmethod
    def open(cls, path_or_id: Path | str, runs_dir: Path | str = "runs") -> Run:
        """An existing run by folder or id; UserError when there is none."""
        path = Path(path_or_id)
        if not (path / "config.yaml").is_file():
            found = _find(runs_dir, str(path_or_id))
            if found is None:
                raise UserError(f"'{path_or_id}' is neither a run folder nor the id of a run in {runs_dir}/")
            path = found
        return cls(path, _id_of(path))

    # --- who is at work -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other trainers of this run out; the system releases the lock when this process dies."""
        with disk_errors(self.path):
            stream = (self.path / "lock").open("a+")
        with stream:
            if not _try_lock(stream, _LOCK_TRIES):
                stream.seek(0)
                pid, _, host = stream.read().strip().partition(" ")
                raise UserError(f"run {self.id} is being trained by pid {pid} on host {host}")
            stream.truncate(0)
            stream.write(f"{os.getpid()} {socket.gethostname()}\n")
            stream.flush()
            self._holds_lock = True
            try:
                yield
            finally:
                self._holds_lock = False

    def begin_attempt(self, **facts: Any) -> int:
        """Start the next attempt (1, 2, ...); ``facts`` (device, world size, job id) are stored with it."""
        attempt = len(self.attempts()) + 1
        record = {"attempt": attempt, "started": _now(), "pid": os.getpid(), "host": socket.gethostname()}
        atomic_write(self._attempt_file(attempt), json.dumps(record | facts, indent=1) + "\n")
        return attempt

    def end_attempt(self, state: str, reason: str = "") -> None:
        """Close the latest attempt as done, failed, diverged, or stopped (resumable, more work to do)."""
        assert state in END_STATES, state
        self.note(ended=_now(), state=state, reason=reason)

    def note(self, **facts: Any) -> None:
        """Add to the latest attempt what becomes known while it runs."""
        record = self.attempts()[-1] | facts
        atomic_write(self._attempt_file(record["attempt"]), json.dumps(record, indent=1) + "\n")

    def noted(self, key: str) -> Any:
        """The value that an attempt has noted under ``key``, the latest one that did; None when none has."""
        return next((record[key] for record in reversed(self.attempts()) if key in record), None)

    def _attempt_file(self, attempt: int) -> Path:
        return self.path / "attempts" / f"{attempt:04d}.json"

    def attempts(self) -> list[dict[str, Any]]:
        """All that was noted of each attempt: attempt, started, host; once it is over also ended, state, reason."""
        return [_read_json(file) for file in self._attempt_files()]

    def _attempt_files(self) -> list[str]:
        folder = f"{self.path}/attempts"
        try:
            names = os.listdir(folder)
        except OSError:  # none has begun
            return []
        return [f"{folder}/{name}" for name in sorted(names) if name.endswith(".json") and name[0] != "."]

    def _newest_attempt(self) -> dict[str, Any] | None:
        files = self._attempt_files()
        return _read_json(files[-1]) if files else None

    def heartbeat(self, facts: Mapping[str, Any]) -> None:
        """Tell other processes that this one lives and where it is."""
        record = {"time": time.time(), "pid": os.getpid(), "host": socket.gethostname(), **facts}
        atomic_write(self.path / "heartbeat.json", json.dumps(record) + "\n")

    def last_heartbeat(self) -> dict[str, Any] | None:
        """The trainer's latest heartbeat with time (s since the epoch), pid and host; None before the first."""
        file = self.path / "heartbeat.json"
        return _read_json(str(file)) if file.exists() else None

    def progress(self) -> str:
        """The last heartbeat as text: ``images 64  images_per_s 11.2  eta_s 30``; empty before the first."""
        beat = self.last_heartbeat() or {}
        return "  ".join(f"{key} {value}" for key, value in beat.items() if key not in ("time", "pid", "host"))

    def state(self) -> str:
        """The run's state: planned (new, or stopped with work left) | running | done | failed (or killed) | diverged.

        Under one's own lock: the state that earlier attempts left.
        """
        if not self._holds_lock and self._is_locked():
            return "running"
        attempt = self._newest_attempt()  # after the lock was asked for: who lets it go has closed its attempt
        if attempt is None or attempt.get("state") == "stopped":
            return "planned"
        if not self._holds_lock and "state" not in attempt and self._beats_elsewhere():
            return "running"
        return attempt.get("state", "failed")

    def reason(self) -> str:
        """Why the latest attempt ended as it did."""
        attempt = self._newest_attempt()
        if attempt is None:
            return ""
        return attempt.get("reason", "") if "state" in attempt else KILLED

    def _is_locked(self) -> bool:
        try:
            with open(f"{self.path}/lock") as stream:
                return not _try_lock(stream, tries=1)
        except OSError:  # nobody has ever locked it
            return False

    def _beats_elsewhere(self) -> bool:
        """Another host's lock may not be visible here; a fresh heartbeat of an open attempt counts too."""
        beat = self.last_heartbeat()
        if beat is None or beat["host"] == socket.gethostname():
            return False
        return time.time() - beat["time"] < 3 * self.config.execution.heartbeat_s

    def provenance(self) -> dict[str, Any]:
        """The origin of its numbers, as noted when the run was made; UserError without it."""
        file = self.path / "provenance.json"
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            message = f"{file}: absent or damaged ({error}); a number without provenance is not shown"
            raise UserError(message) from None

    # --- records ------------------------------------------------------------------------------------------

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; it carries ``attempt`` and ``images``."""
        assert "attempt" in record and "images" in record
        _append_line(self.path / "metrics.jsonl", record)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a last line torn by a crash is left out."""
        return _read_lines(self.path / "metrics.jsonl")

    def rewind_metrics(self, images: int) -> None:
        """Drop the lines beyond the position that training resumes from."""
        kept = [line for line in self.metrics() if line["images"] <= images]
        atomic_write(self.path / "metrics.jsonl", "".join(_dump_line(line) for line in kept))

    def append_eval(self, record: Mapping[str, Any]) -> None:
        """Add one measured value with its protocol to evals.jsonl."""
        assert all(key in record for key in (*KEY, "value", "n")), record
        _append_line(self.path / "evals.jsonl", {"run": self.id, "time": _now(), **record})

    def evals(self) -> list[dict[str, Any]]:
        """Measured values; of several with one metric, split, steps, weights, images, protocol the newest."""
        newest = {tuple(line[k] for k in KEY): line for line in _read_lines(self.path / "evals.jsonl")}
        return list(newest.values())

    def numbers(self) -> list[Number]:
        """The measured values of ``evals``, each with its protocol as it is in the file."""
        return read_numbers(self.path / "evals.jsonl")


def _try_lock(stream: TextIO, tries: int) -> bool:
    for left in reversed(range(tries)):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if left:
                time.sleep(0.02)
    return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _dump_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    with disk_errors(path), path.open("a+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":  # a line torn by a crash: close it, so that only it is lost
                stream.write(b"\n")
        stream.write(_dump_line(record).encode())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    out = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            out.append(_decoded(line))
    return out


def _decoded(line: bytes) -> dict[str, Any]:
    """One line of JSON, in which a loss may be NaN: msgspec is quick, but strict."""
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        return json.loads(line)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            return _decoded(stream.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error})") from error
