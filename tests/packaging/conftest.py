"""The tracked files, which every rule of this folder looks at."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Return the files that git tracks and that exist, as absolute paths."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sources(tracked: list[Path]) -> dict[Path, str]:
    """Return the text of every tracked Python file."""
    return {path: path.read_text(encoding="utf-8") for path in tracked if path.suffix == ".py"}
