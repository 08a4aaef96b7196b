"""The logs of a grid's cells: a file for each training and each measurement, whatever starts it. Torch-free.

Every attempt begins with a line of its own (``heading``) and is appended.
"""

from __future__ import annotations

from pathlib import Path

from ablations.grid import Cell
from ablations.work import EVALUATE, TRAIN, Work, job_root
from core.run import find_runs
from experiments.attempts import HEADING

LAST_LINES = 5


def log_of(runs_dir: Path, key: str) -> Path:
    """The log of the work with this key, whatever job does it."""
    return job_root(runs_dir) / "logs" / f"{key}.log"


def logs_of(cell: Cell, runs_dir: Path) -> list[Path]:
    """Logs of the cell's training and its measurement; of a run that no job has trained, the one in its folder."""
    ours = [log_of(runs_dir, Work(kind, cell).key) for kind in (TRAIN, EVALUATE)]
    folders = (path for path in find_runs(runs_dir) if path.name.rpartition("-")[2] == cell.id)
    found = [log for log in ours if log.exists()]
    return found or [path / "log.txt" for path in folders if (path / "log.txt").exists()]


def newest_attempt(log: Path) -> list[str]:
    """Lines of the newest attempt, its heading first; none without a log."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return []
    starts = [found.start() for found in HEADING.finditer(text)]
    return text[starts[-1] if starts else 0 :].splitlines()


def last_lines(log: Path, count: int = LAST_LINES) -> str:
    """The end of a cell's log in one line."""
    said = (line.strip() for line in newest_attempt(log) if not HEADING.match(line))
    lines = [line for line in said if line]
    return " | ".join(lines[-count:])
