"""``fewstep verify RUN``: does a run, or a committed record of one, still say what it said? Torch-free.

Identity, weights, data, code, completeness and protocols are recomputed from the files and compared with what the
folder claims. A check that cannot be made here (weights that are not on this machine) says so and fails nothing.
Values that the experiment expects are told beside those that were reached. One that was not reached is no failure: the
run may have had a shorter budget, another seed or other settings, and its record is none the less what was measured.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from core.config import UserError, resolve, run_id
from core.metrics.cost import amount
from core.provenance import changed_since, package_versions
from core.run import Run
from experiments.expected import outcomes
from experiments.soundness import wrong_log, wrong_numbers, wrong_origin

PASSED, FAILED, UNKNOWN = "ok", "FAILED", "not checked"


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    name: str
    outcome: str
    detail: str


def verify(run: Run) -> list[Check]:
    """All checks of a run folder."""
    expected = [Check(outcome.name, outcome.verdict, outcome.detail) for outcome in outcomes(run)]
    return [
        *_identity(run),
        _provenance(run),
        _origin(run),
        _training(run),
        _log(run),
        _numbers(run),
        _packages(run),
        *expected,
    ]


def _check(name: str, holds: bool, detail: str) -> Check:
    return Check(name, PASSED if holds else FAILED, detail)


def _identity(run: Run) -> Iterator[Check]:
    """The id is the hash of the stored configuration; weights and data found here have the stored hashes."""
    backbone, data = run.config.backbone, run.config.data
    stored = {"weights": (backbone.path, backbone.weights_hash), "data": (data.path, data.data_hash)}
    recomputed = run_id(run.config)
    yield _check("identity", recomputed == run.id, f"the configuration's hash is {recomputed}")
    try:
        resolve(run.config)
    except UserError as error:
        yield Check("weights and data", UNKNOWN, str(error))
        return
    found = {"weights": backbone.weights_hash, "data": data.data_hash}
    for name, (path, before) in stored.items():
        yield _check(name, found[name] == before, f"{path}: {before}" + _now(before, found[name]))


def _now(before: str, found: str) -> str:
    return "" if found == before else f", here {found}"


def _provenance(run: Run) -> Check:
    """The commit is clean and known; what has changed in the code since is told, it is no failure."""
    facts = run.provenance()
    commit = facts.get("commit")
    if facts.get("dirty_patch"):
        return Check("code", FAILED, f"trained with uncommitted changes on top of {str(commit)[:12]}")
    if commit is None:
        return Check("code", UNKNOWN, "the run was made outside a checkout")
    changed = changed_since(commit, "core", "experiments")
    if changed is None:
        return Check("code", UNKNOWN, f"commit {commit[:12]} is not in this checkout")
    since = f"; {len(changed)} files of core and experiments have changed since" if changed else ""
    return Check("code", PASSED, f"commit {commit[:12]}, clean{since}")


def _training(run: Run) -> Check:
    """Finished, and at the end of its budget."""
    state, budget = run.state(), run.config.train.budget
    if state == "diverged":
        return Check("training", PASSED, f"diverged: {run.reason()}")
    if not run.config.method.trains or state != "done":
        return _check("training", state == "done", state)
    lines = run.metrics()
    reached = amount(lines[-1], budget.unit) if lines else 0
    return _check("training", reached >= budget.amount, f"{reached:,} of {budget.amount:,} {budget.unit}")


def _numbers(run: Run) -> Check:
    """Every number is finite, of this run, once, under its own protocol, and none that was asked for is missing."""
    problem = next(wrong_numbers(run), "")
    lines = run.evals()
    return _check("numbers", bool(lines) and not problem, problem or f"{len(lines)} with their protocols")


def _log(run: Run) -> Check:
    """Lines are whole and finite, and totals rise."""
    problem = next(wrong_log(run), "")
    return _check("log", not problem, problem or f"{len(run.metrics())} lines")


def _origin(run: Run) -> Check:
    """The provenance names the weights and data of the configuration."""
    problem = next(wrong_origin(run), "")
    return _check("origin", not problem, problem or "as the configuration says")


def _packages(run: Run) -> Check:
    """Other versions are told; they are no failure."""
    before, now = run.provenance().get("packages", {}), package_versions()
    differing = [
        f"{name} {version} (here {now.get(name)})" for name, version in before.items() if now.get(name) != version
    ]
    return Check("packages", PASSED, ", ".join(differing) or "as here")


def run_command(arguments: Namespace) -> int:
    """Print every check; exit code 1 when one fails."""
    run = Run.open(arguments.target, arguments.runs_dir or "runs")
    checks = verify(run)
    print(f"{run.id}  {run.path}")
    for check in checks:
        print(f"  {check.outcome:<14}{check.name:<24}{check.detail}")
    return int(any(check.outcome == FAILED for check in checks))
