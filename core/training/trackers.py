"""Trackers show a run beside others while it trains: TensorBoard, Weights & Biases, Trackio.

Each is a few lines through its own library, which is imported when the tracker is asked for. The run's own log remains
what everything is computed from, so a tracker may fail: it is told once and dropped, and the training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from core.run import Run

log = logging.getLogger("fewstep")

PROJECT = "fewstep"


class Tracker(Protocol):
    """One place where a run is shown; any call may raise. ``iteration``: after how many of them."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Show numbers by name."""

    def image(self, name: str, file: Path, iteration: int) -> None:
        """Show the picture in ``file``."""

    def close(self) -> None:
        """Write what is pending; nothing is shown afterwards."""


class TensorBoard:
    """Event files in the run's folder, read by ``tensorboard --logdir runs``."""

    def __init__(self, run: Run, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an attempt that was cut off had written beyond the state from which this one goes on
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=iteration + 1)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def image(self, name: str, file: Path, iteration: int) -> None:
        with Image.open(file) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), iteration, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases under the run's own id; offline, in the run's folder, for who is not logged in."""

    def __init__(self, run: Run, iteration: int) -> None:
        import wandb

        mode = None if wandb.login(prompt=False) else "offline"
        name, config = f"{run.config.name} {run.id}", asdict(run.config)
        self._run = wandb.init(
            project=PROJECT, id=run.id, name=name, dir=run.path, config=config, resume="allow", mode=mode
        )
        # Its own steps never go back, as a run does that goes on from an earlier state
        self._run.define_metric("*", step_metric="iteration")

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log({**values, "iteration": iteration})

    def image(self, name: str, file: Path, iteration: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(file)), "iteration": iteration})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio under the run's own id, where Trackio keeps its projects (``TRACKIO_DIR``)."""

    def __init__(self, run: Run, iteration: int) -> None:
        import trackio

        options = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
        config = asdict(run.config)
        self._run = trackio.init(project=PROJECT, name=run.id, config=config, resume="allow", **options)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def image(self, name: str, file: Path, iteration: int) -> None:
        import trackio

        self._run.log({name: trackio.Image(str(file))}, step=iteration)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Run, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


class Trackers:
    """The trackers of one attempt, each until it fails; none of them ever stops the training."""

    def __init__(self, run: Run, names: Iterable[str], iteration: int) -> None:
        """Go on with what ``run`` has shown up to ``iteration``."""
        self._open: dict[str, Tracker] = {}
        for name in names:
            tracker = self._tried(name, TRACKERS[name], run, iteration)
            if tracker is not None:
                self._open[name] = tracker

    def log_line(self, line: Mapping[str, Any]) -> None:
        """Show the numbers of a line of the run's log under its own keys, at its iteration."""
        values = {key: value for key, value in line.items() if isinstance(value, int | float)}
        iteration = values.pop("iteration")
        values.pop("attempt")
        self.scalars(values, iteration)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Show numbers by name."""
        self._each("scalars", values, iteration)

    def image(self, name: str, file: Path, iteration: int) -> None:
        """Show the picture in ``file``."""
        self._each("image", name, file, iteration)

    def close(self) -> None:
        """Write what is pending."""
        self._each("close")
        self._open.clear()

    def _each(self, call: str, *given: Any) -> None:
        for name, tracker in list(self._open.items()):
            self._tried(name, getattr(tracker, call), *given)

    def _tried(self, name: str, call: Callable[..., Any], *given: Any) -> Any:
        """The result of a call; a failure is told, and the tracker dropped."""
        try:
            return call(*given)
        except Exception as error:  # whatever its library raises, for a full disk or an absent network
            first = str(error).strip().partition("\n")[0]
            log.warning("execution.report_to: %s failed and is off: %s: %s", name, type(error).__name__, first)
            self._open.pop(name, None)
            return None
