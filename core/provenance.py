"""The origin of a run's numbers: code, packages, weights, data, machine. Torch-free."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from core.schema import ExperimentConfig

_PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "peft", "numpy", "omegaconf", "hydra-core")
_MAX_PATCH_CHARS = 200_000
ROOT = Path(__file__).resolve().parent.parent


def provenance(config: ExperimentConfig) -> dict[str, Any]:
    """Facts to store beside a run when it is created; job ids and devices belong to its attempts."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": head(),
        "dirty_patch": (_git("diff", "HEAD") or _snapshot("PATCH") or "")[:_MAX_PATCH_CHARS],
        "packages": package_versions(),
        "weights_hash": config.backbone.weights_hash,
        "data_hash": config.data.data_hash,
        "parent": config.train.parent,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
    }


def head() -> str | None:
    """The commit of the code; None where it is not known."""
    return _git("rev-parse", "HEAD") or _snapshot("COMMIT")


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that results depend on."""
    return {name: _version(name) for name in _PACKAGES}


def changed_since(commit: str, *folders: str) -> list[str] | None:
    """Files below ``folders`` that differ from ``commit``, uncommitted ones included; None: the commit is unknown."""
    changed = _git("diff", "--name-only", commit, "--", *folders)
    return None if changed is None else changed.splitlines()


def _snapshot(name: str) -> str | None:
    """A file that ablations/snapshot.py leaves in a copy of the code: the commit, and what was not committed."""
    try:
        return (ROOT / name).read_text(errors="replace").strip()
    except OSError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the project's own checkout; None when the package was installed without one."""
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
