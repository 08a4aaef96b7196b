"""Shares of a command's time by package, from Python's own profiler."""

from __future__ import annotations

import pstats
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from core.config import UserError
from core.provenance import ROOT

MOST = 6  # packages that are named


def time_by_package(words: Sequence[str]) -> dict[str, float]:
    """Shares of the time that functions of each package take themselves, in a run of ``fewstep WORDS``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile"
        command = [sys.executable, "-m", "cProfile", "-o", str(file), "-m", "experiments.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.exists():
            raise UserError(f"fewstep {' '.join(words)}: no profile ({done.stderr.strip()[-200:]})")
        seconds = _seconds(file)
    total = seconds.total()
    found = {name: part / total for name, part in seconds.most_common(MOST)}
    return found | {"other packages": max(0.0, 1 - sum(found.values()))}


def _seconds(file: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for (path, _, name), (_, _, own, _, _) in pstats.Stats(str(file)).stats.items():
        found[package_of(path, name)] += own
    return found


def package_of(path: str, name: str) -> str:
    """The package of a function; built-in functions are named by what they are for."""
    parts = Path(path).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    if Path(path).is_relative_to(ROOT):
        return Path(path).relative_to(ROOT).parts[0]
    if path == "~":
        return _of_builtin(name)
    return "reading modules" if "importlib" in path else "Python's library"


def _of_builtin(name: str) -> str:
    """Modules that are read and made are told apart from other built-in functions."""
    importing = ("marshal.loads", "_imp.", "create_dynamic", "exec_dynamic", "__build_class__")
    return "reading modules" if any(word in name for word in importing) else "built-in functions"
