"""Completion of the command line in a shell, by argcomplete: names of experiments, runs and grids beside its own words.

``fewstep completion SHELL`` prints what a shell runs at its start. At a tab the shell starts ``fewstep`` with the line
so far in its environment.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def complete_if_asked(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks how its line may go on, and end the process; nothing otherwise."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def completed_by(action: argparse.Action, names: Callable[[Namespace], Iterable[str]], files: str = "") -> None:
    """Complete what ``action`` takes by names, which may depend on the line so far, and files of one kind."""

    def completer(prefix: str, parsed_args: Namespace, **_: Any) -> list[str]:
        from argcomplete import FilesCompleter

        found = FilesCompleter([files])(prefix) if files else []
        return [*names(parsed_args), *found]

    action.completer = completer


def experiment_names(arguments: Namespace) -> list[str]:
    """Names of the experiments that come with the project."""
    from core.config import experiments

    return experiments()


def run_ids(arguments: Namespace) -> list[str]:
    """Ids of the runs that are there."""
    from core.run import find_runs

    runs = find_runs(getattr(arguments, "runs_dir", None) or "runs")
    return [path.name.rpartition("-")[2] for path in runs]


def target_names(arguments: Namespace) -> list[str]:
    """Ids of the runs that are there, and names of experiments."""
    return [*run_ids(arguments), *experiment_names(arguments)]


def run_command(arguments: Namespace) -> int:
    """``fewstep completion SHELL``."""
    from argcomplete import shellcode

    print(shellcode(["fewstep"], shell=arguments.shell))
    return 0
