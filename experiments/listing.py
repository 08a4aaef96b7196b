"""``fewstep list``: what can be named on the command line, with one line each. Torch-free.

A layer above this one registers what it adds (``register_kind``), as it registers its subcommands.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

Lines = Iterator[tuple[str, str]]  # name, and what it is
KINDS: dict[str, Callable[[], Lines]] = {}


def register_kind(name: str, lines: Callable[[], Lines]) -> None:
    """Let ``fewstep list`` show the names that ``lines`` gives, under the heading ``name``."""
    KINDS[name] = lines


def run_command(arguments: Namespace) -> int:
    """Print one kind, or all kinds under their names."""
    if arguments.kind is not None:
        _print(KINDS[arguments.kind](), indent="")
        return 0
    for number, (name, lines) in enumerate(KINDS.items()):
        print(f"\n{name}" if number else name)
        _print(lines(), indent="  ")
    return 0


def _print(lines: Lines, indent: str) -> None:
    rows = list(lines)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{indent}{name:<{width}}  {text}".rstrip())


def _experiments() -> Lines:
    from core.config import config_dir, experiments

    for name in experiments():
        yield name, first_comment(config_dir() / "experiment" / f"{name}.yaml")


def _methods() -> Lines:
    from core.schema import SCHEMAS, discover_schemas

    discover_schemas()
    for name, schema in sorted(SCHEMAS["method"].items()):
        yield name, (schema.__doc__ or "").partition("\n")[0]


def _backbones() -> Lines:
    from core.config import config_dir

    for file in sorted((config_dir() / "backbone").glob("*.yaml")):
        yield file.stem, first_comment(file)


def _metrics() -> Lines:
    from core.catalogue import METRICS

    for name, metric in METRICS.items():
        yield name, f"{metric.label}: {metric.meaning}"


def first_comment(file: Path) -> str:
    """The first sentence of the comment that a YAML file begins with, or nothing."""
    words = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):  # Hydra's own
            words.append(line.strip("# "))
    return " ".join(words).partition(". ")[0].removesuffix(".")


register_kind("experiments", _experiments)
register_kind("methods", _methods)
register_kind("backbones", _backbones)
register_kind("metrics", _metrics)
