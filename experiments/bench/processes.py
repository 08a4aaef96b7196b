"""The cheap commands, each in a process of its own, as a user starts them."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core.config import UserError
from experiments.bench.folders import write_grid, write_runs
from experiments.bench.timing import spread

POLL_S = 0.02
PATIENCE_S = 600.0
FIRST_STEP = (  # a step of a training whose latents and teacher solutions are cached
    "train", "flash/emoji", "data.num_variants=1", "execution.num_threads=1", "execution.log_every_images=32",
    "execution.stop_after_images=32",
)  # fmt: skip


class Places:
    """A temporary folder, and the run folders in it once a row asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    @cached_property
    def grid(self) -> list[str]:
        """The words that name a grid of 1,000 finished runs and where they lie."""
        file = write_grid(self.folder)
        return [str(file), "--runs-dir", str(write_runs(self.folder))]

    def fresh(self) -> Path:
        """A folder that does not exist yet."""
        return self.folder / f"out-{next(self._numbers)}"


def seconds_of(words: Sequence[str]) -> float:
    """Seconds of ``fewstep WORDS`` from its start to its end."""
    began = time.perf_counter()
    done = subprocess.run(command(words), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"fewstep {' '.join(words)}: {last[0]}")
    return seconds


def command(words: Sequence[str]) -> list[str]:
    """The command line of ``fewstep WORDS`` with this interpreter."""
    return [sys.executable, "-m", "experiments.cli", *words]


def seconds_to_first_step(words: Sequence[str]) -> float:
    """Seconds from the start of a training to the first line of its log, after which it is stopped.

    The last of ``words`` says in which folder its runs lie.
    """
    runs_dir = Path(words[-1].removeprefix("execution.runs_dir="))
    began = time.perf_counter()
    process = subprocess.Popen(command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _has_logged(runs_dir):
            seconds = time.perf_counter() - began
            if process.poll() is not None or seconds > PATIENCE_S:
                raise UserError(f"fewstep {' '.join(words)}: no step after {seconds:.0f} s")
            time.sleep(POLL_S)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def _has_logged(runs_dir: Path) -> bool:
    return any(file.stat().st_size for file in runs_dir.glob("*/*/*/metrics.jsonl"))


COMMANDS: dict[str, Callable[[Places], list[str]]] = {
    "grid_status": lambda places: ["grid", "status", *places.grid],
    "grid_plan": lambda places: ["grid", "plan", *places.grid],
    "table": lambda places: ["table", *places.grid],
    "results": lambda places: ["results", "--out", str(places.fresh())],
    "first_step": lambda places: [*FIRST_STEP, f"execution.runs_dir={places.fresh()}"],
}


def time_command(name: str, places: Places, repeats: int) -> dict[str, Any]:
    """Seconds of a command, after one run that warms the caches of files and of the project."""
    measure = seconds_to_first_step if name == "first_step" else seconds_of
    words = COMMANDS[name]
    measure(words(places))
    return {"seconds": spread([measure(words(places)) for _ in range(repeats)])}
