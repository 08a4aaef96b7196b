"""A run tells how it goes: metrics, pictures, a progress bar on a terminal or else a heartbeat line, and trackers."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from core.methods.clock import Clock
from core.run import Run
from core.training.trackers import Trackers
from core.training.world import ALONE, World

log = logging.getLogger("fewstep")


class AboveBar(logging.StreamHandler):
    """Writes lines of a log to a terminal above the bar that keeps its last line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # as every handler of a log: what cannot be told stops nobody
            self.handleError(record)


class Monitor:
    """Averages device scalars between log points; reads them on the host once per log point. Rank 0 alone tells."""

    def __init__(
        self,
        run: Run,
        clock: Clock,
        attempt: int,
        heartbeat_s: float,
        report_to: Sequence[str] = (),
        world: World = ALONE,
    ) -> None:
        self.run, self.clock, self.attempt, self.heartbeat_s, self.world = run, clock, attempt, heartbeat_s, world
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last_line = self._last_log = time.monotonic()
        self._last_images = self._first_images = clock.images
        self._started = time.monotonic()
        shows = world.is_main and sys.stderr.isatty()
        self._bar = _bar(clock) if shows else None
        self._trackers = Trackers(run, report_to if world.is_main else (), clock.iteration)

    def add(self, name: str, value: Tensor) -> None:
        """Accumulate one detached scalar."""
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def flush(self) -> dict[str, float]:
        """Write one metrics line; returns its averages."""
        names = list(self._sums)
        values = torch.stack([self._sums[n].float() for n in names]).tolist() if names else []
        means = {name: value / self._counts[name] for name, value in zip(names, values, strict=True)}
        self._sums, self._counts = {}, {}
        if self.world.size > 1:
            means = {name: value / self.world.size for name, value in self.world.total(means).items()}
        now, clock, counters = time.monotonic(), self.clock, self.clock.counters(self.world.total)
        line: dict[str, Any] = {
            "attempt": self.attempt,
            "iteration": clock.iteration,
            "images": clock.images,
            "student_images": clock.student_images,
            "evaluations": counters["evaluations"],
            "stored_evaluations": counters["stored"],
            "ahead_evaluations": counters["ahead"],
            "seconds": round(counters["seconds"], 3),
            "device_hours": counters["seconds"] / 3600,
            "images_per_s": round((clock.images - self._last_images) / max(now - self._last_log, 1e-9), 2),
            **means,
        }
        self._last_log, self._last_images = now, clock.images
        if self.world.is_main:
            self.run.append_metrics(line)
            self._trackers.log_line(line)
        return means

    def tick(self, means: dict[str, float] | None = None) -> None:
        """Show progress; ``means`` only at log points."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self.clock.amount - self._bar.n)
            if means:
                self._bar.set_postfix({k: f"{v:.3g}" for k, v in means.items() if k.count("/") == 1}, refresh=False)
        if now - self._last_line < self.heartbeat_s or not self.world.is_main:
            return
        self._last_line = now
        speed = (self.clock.images - self._first_images) / max(now - self._started, 1e-9)
        remaining = (1 - self.clock.fraction) / max(self.clock.fraction, 1e-9) * self.clock.seconds
        self.run.heartbeat({"images": self.clock.images, "images_per_s": round(speed, 2), "eta_s": round(remaining)})
        if self._bar is None:
            text = f"{self.run.id}  {self.clock.fraction:4.0%}  {self.clock.images} images  {speed:.1f} images/s"
            log.info("%s  ETA %d s", text, remaining)

    def sheet(self, file: Path) -> None:
        """Tell that a sheet of pictures has been written."""
        log.info("sheet after %s images: %s", f"{self.clock.images:,}", file)
        self._trackers.image("sheet", file, self.clock.iteration)

    def measured(self, values: Mapping[str, float]) -> None:
        """Show the values of metrics by name, measured now."""
        self._trackers.scalars(values, self.clock.iteration)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._trackers.close()


def _bar(clock: Clock) -> tqdm:
    return tqdm(total=clock.budget, initial=clock.amount, unit=f" {clock.unit}", dynamic_ncols=True)
