# PYTHON_ARGCOMPLETE_OK
"""The ``fewstep`` command. Every layer registers its subcommands: entry points ``fewstep.commands``.

A subcommand's parser sets ``run``, a function of the parsed arguments that returns an exit code. A user's
mistake is one line on stderr and exit code 2. Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version

from core.schema import UserError
from experiments.completion import complete_if_asked
from experiments.parser import Parser, parse

LAYERS = ("experiments", "ablations", "slurm", "analysis")  # a layer may add to what those before it have registered


def build_parser() -> Parser:
    """The parser with the subcommands of all installed layers."""
    parser = Parser(
        prog="fewstep",
        description="Distil diffusion models into few-step students; ablate, tabulate and plot it.",
    )
    parser.add_argument("--version", action="version", version=f"fewstep {version('fewstep')}", help="show the version")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    entries = entry_points(group="fewstep.commands")
    for entry in sorted(entries, key=lambda entry: LAYERS.index(entry.name)):
        entry.load()(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        parser = build_parser()
        complete_if_asked(parser)
        arguments = parse(parser, argv)
        return arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
