"""Shared test environment: one thread per process, no network, and a temporary working directory."""

import os
from pathlib import Path

import pytest

# Set before any test module imports torch, so that collection stays free of it. Subprocesses inherit them.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    """Return the root of the source tree."""
    return ROOT


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each test in its own empty folder: a default like ``runs/`` never lands in the source tree."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
