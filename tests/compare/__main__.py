"""``python -m tests.compare REVISION``: does the working tree compute what another revision computed?

Under both the golden curves are drawn, and every experiment is configured, trained for four iterations and measured:
in fp32 on one thread of the CPU, at paper scale with a random pipeline of its class. Each line says ``identical``, or
what differs first (before | after). Exit code 0: all are identical.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.schema import UserError, check_choice
from tests.compare.differences import first_difference, of_json
from tests.compare.revisions import GOLDEN, Inputs, Side, checkouts, replay

ROOT = Path(__file__).resolve().parents[2]
IDENTICAL, NEW = "identical", "new: the revision does not have it"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command: 0 identical, 1 a difference or a failure, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m tests.compare", description=__doc__)
    parser.add_argument("revision", help="a commit to compare the working tree with, e.g. HEAD~1")
    parser.add_argument(
        "--experiments", nargs="+", metavar="NAME", help="only these; default: all, with the golden curves"
    )
    parser.add_argument("--keep", metavar="DIR", help="leave both sides' runs and logs in this new folder")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            return compare(arguments.revision, arguments.experiments, Path(arguments.keep or temporary).resolve())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(revision: str, names: Sequence[str] | None, folder: Path) -> int:
    """Run both sides below ``folder`` and print a line for every experiment."""
    with checkouts(ROOT, revision, folder) as sides:
        chosen = choose(names, sorted({*sides[0].experiments, *sides[1].experiments}))
        inputs = Inputs.write(folder)
        for side in sides:
            print(f"{side.folder.name}:", file=sys.stderr)
            replay(side, chosen, inputs)
        verdicts = {GOLDEN: of_golden(*sides)} | {name: of_experiment(name, *sides) for name in chosen}
    width = max(len(name) for name in verdicts)
    for name, verdict in verdicts.items():
        print(f"{name:<{width}}  {verdict}")
    return int(not set(verdicts.values()) <= {IDENTICAL, NEW})


def choose(names: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    """The experiments to compare; UserError for one that neither side has."""
    for name in names or ():
        check_choice("--experiments", name, known)
    return names or known


def of_golden(before: Side, after: Side) -> str:
    """The first difference of the golden curves, or ``identical``."""
    if failed := failure(GOLDEN, before, after):
        return failed
    one, other = (side.code / "tests" / "golden" for side in (before, after))
    names = {file.name for file in (*one.glob("*.json"), *other.glob("*.json"))}
    for name in sorted(names):
        if found := of_json(one / name, other / name):
            return found
    return IDENTICAL


def of_experiment(name: str, before: Side, after: Side) -> str:
    """The first difference of an experiment under both revisions, ``identical``, or ``new``."""
    if name not in after.experiments:
        return "gone: the working tree does not have it"
    if name not in before.experiments:
        return NEW
    if failed := failure(f"config {name}", before, after) or failure(name, before, after):
        return failed
    ids = [side.log(f"config {name}").read_text().partition("\n")[0] for side in (before, after)]
    if ids[0] != ids[1]:
        return f"fewstep config: {ids[0]} | {ids[1]}"
    runs = [side.run_folder(name) for side in (before, after)]
    if None in runs:
        return f"no run folder: {runs[0]} | {runs[1]}"
    found = first_difference(*runs)
    return IDENTICAL if found is None else found + _dropped(name, before, after)


def failure(job: str, before: Side, after: Side) -> str | None:
    """Which side a job failed on, with the last line that it printed."""
    for side in (before, after):
        code = side.results()[job]["code"]
        if code != 0:
            said = side.log(job).read_text(errors="replace").strip().splitlines()
            return f"failed {side.folder.name} (exit code {code}): {said[-1] if said else 'nothing was printed'}"
    return None


def _dropped(job: str, before: Side, after: Side) -> str:
    """A hint at settings that only one side knows."""
    one, other = (side.results()[job]["dropped"] for side in (before, after))
    return "" if one == other else f" (unknown settings: {', '.join(one) or '-'} | {', '.join(other) or '-'})"


if __name__ == "__main__":
    sys.exit(main())
