"""The target of ``sample``, ``evaluate`` and ``export``: a run by folder or id, or an experiment's own
run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import core.config
from core.config import ExperimentConfig, UserError, compose, experiments, is_experiment, resolve
from core.run import Run
from core.schema import nearest

if TYPE_CHECKING:
    from experiments.session import Session

CHANGEABLE = ("eval", "execution")


def open_target(target: str, overrides: Sequence[str] = (), runs_dir: str | None = None) -> Run:
    """``target``: a run folder, a run id in ``runs_dir``, or an experiment (its run is found or created).

    A run is what its configuration says, so only eval.* and execution.* can be changed afterwards; an
    experiment takes any override, because it says which run is meant.
    """
    if is_experiment(target):
        where = [f"execution.runs_dir={runs_dir}"] if runs_dir else []
        return Run.create(resolve(compose(target, [*overrides, *where])))
    try:
        run = Run.open(target, runs_dir or "runs")
    except UserError as error:
        meant = "" if Path(target).exists() else nearest(target, experiments())
        raise UserError(f"{error}{meant}") from None
    run.config = override(run.config, overrides)
    return run


def load_target(run: Run, images: int | None = None) -> Session:
    """The session of a run from ``open_target``, executed as its configuration says; ``images``: see ``load_run``."""
    import torch

    from experiments.session import load_run

    if run.config.execution.num_threads:
        torch.set_num_threads(run.config.execution.num_threads)
    session, _ = load_run(run.path, overrides=vars(run.config.execution), images=images)
    session.config.eval = run.config.eval
    return session


def override(config: ExperimentConfig, overrides: Sequence[str]) -> ExperimentConfig:
    """``config`` with ``eval.key=value`` and ``execution.key=value`` applied and validated."""
    for text in overrides:
        key, equals, _ = text.partition("=")
        group, _, field = key.partition(".")
        if not equals or not field:
            raise UserError(f"'{text}' is not an override; write key=value, e.g. eval.num_images=500")
        if group not in CHANGEABLE:
            raise UserError(f"{key} says what the run is and cannot be changed; allowed: eval.*, execution.*")
    return core.config.override(config, overrides)
