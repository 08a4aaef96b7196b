"""The project from Python: compose a configuration, train it, open the run, draw, and measure.

The same code as the commands', without their printing: runs have the same ids and lie in the same folders. What is
wrong in a configuration is a ``UserError`` of one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import core.config
from core.config import ExperimentConfig
from core.data.requests import Requests
from core.run import Run
from core.sampler import Setting
from experiments import evaluate as measuring
from experiments import session as sessions
from experiments.session import Session
from experiments.train import DONE, train_config


def compose(experiment: str, *overrides: str) -> ExperimentConfig:
    """The resolved configuration of an experiment with ``key=value`` overrides, as ``fewstep config`` prints it."""
    return core.config.resolve(core.config.compose(experiment, overrides))


def train(config: ExperimentConfig) -> Run:
    """Train to the end of the budget, or go on with a run that was stopped; its folder afterwards.

    Raises RuntimeError for a training that diverged or was stopped by a signal; the run's log says which.
    """
    code = train_config(config)
    run = Run.create(config)
    if code != DONE:
        raise RuntimeError(f"run {run.id} is not done: {run.path / 'log.txt'} says why")
    return run


def load_run(run: Run | Path | str, runs_dir: Path | str = "runs", images: int | None = None) -> Session:
    """A run with its newest weights, or those after ``images`` training images (0: none), ready to sample.

    ``run`` is a run, its folder, or its id below ``runs_dir``.
    """
    path_or_id = run.path if isinstance(run, Run) else run
    return sessions.load_run(path_or_id, runs_dir, images=images)[0]


def sample(session: Session, prompts: Requests | Sequence[str], steps: int, seed: int = 0) -> np.ndarray:
    """One picture of each request by the student, uint8 (B, H, W, 3), with the weights and sampler of the run's eval.

    A task with further inputs needs ``Requests``.
    """
    settings = session.config.eval
    requests = prompts if isinstance(prompts, Requests) else Requests(tuple(prompts))
    return session.sample(requests, Setting(settings.weights, settings.sampler_at(steps)), seed).images


def evaluate(session: Session, run: Run) -> list[dict[str, Any]]:
    """Measure what the run's eval asks for and nobody has measured; all its values, a line each with its protocol."""
    return measuring.evaluate(session, run)
