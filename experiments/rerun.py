"""``fewstep rerun RUN``: train and measure a run again, from its configuration alone, and compare the numbers.

The second run lies in a folder of its own, so that the first one is neither read nor changed, and solves the teacher's
problems again into a store of its own, together as the first run did: that decides the last digits. On one machine with
the same packages and number of threads it is bit-identical; elsewhere sums are rounded in another order and a training
amplifies that, so numbers agree to a tolerance.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from core.config import ExperimentConfig, UserError
from core.run import Run
from experiments.target import override


@dataclass(frozen=True)
class Agreement:
    """One number of the first run beside the second's."""

    metric: str
    split: str
    steps: int
    before: float
    after: float

    @property
    def relative(self) -> float:
        """|after - before| / |before|."""
        return abs(self.after - self.before) / max(abs(self.before), 1e-12)


def rerun(run: Run, out: Path, overrides: Sequence[str] = ()) -> list[Agreement]:
    """Train ``run`` again below ``out`` and pair the numbers that both runs have under one protocol."""
    from experiments.train import train_config

    before = _final(run.evals())
    if not before:
        raise UserError(f"run {run.id} has no numbers to compare with; measure it first (fewstep evaluate)")
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="solutions-", dir=out) as solutions:
        config = again(run.config, out, overrides)
        config.execution.solutions_dir = solutions
        code = train_config(config, evaluate=True)
    second = Run.create(config)
    if code:
        raise UserError(f"the second run did not finish ({second.state()}: {second.reason()}); see {second.path}")
    after = _final(second.evals())
    return [
        Agreement(line["metric"], line["split"], line["steps"], line["value"], after[key]["value"])
        for key, line in before.items()
        if key in after
    ]


def again(config: ExperimentConfig, out: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The same configuration, executed below ``out``."""
    changed = override(copy.deepcopy(config), overrides)
    changed.execution.runs_dir = str(out)
    return changed


def _final(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The numbers at the end of the budget by (protocol, weights)."""
    end = max((line["images"] for line in lines), default=0)
    return {(line["protocol"], line["weights"]): line for line in lines if line["images"] == end}


def run_command(arguments: Namespace) -> int:
    """Print both numbers of every pair; exit code 1 when one differs by more than the tolerance."""
    run = Run.open(arguments.target, arguments.runs_dir or "runs")
    agreements = rerun(run, Path(arguments.out), arguments.overrides)
    if not agreements:
        raise UserError(f"no number of run {run.id} was measured by the protocol of its own configuration")
    print(f"{'metric':<14}{'split':<10}{'steps':>5}{'before':>12}{'again':>12}{'difference':>12}")
    for a in agreements:
        print(f"{a.metric:<14}{a.split:<10}{a.steps:>5}{a.before:>12.5g}{a.after:>12.5g}{a.relative:>12.2%}")
    worst = max(agreements, key=lambda a: a.relative)
    agrees = worst.relative <= arguments.tolerance
    print(
        f"{'agree' if agrees else 'DISAGREE'}: {len(agreements)} numbers, the worst differs by {worst.relative:.2%}"
        f" (tolerance {arguments.tolerance:.2%})"
    )
    return int(not agrees)
