"""Results kept to save time: what cannot be read is absent, what cannot be written is made again next time."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
from pathlib import Path
from typing import Any


def recall(file: Path) -> dict[str, Any]:
    """The values remembered in ``file``; none when it is absent or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def remember(file: Path, values: dict[str, Any]) -> None:
    """Replace ``file`` in one step, so that no reader finds half of it."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(values))
        temporary.replace(file)


def packed(values: Any) -> bytes:
    """Plain values as bytes to remember something by, equal for equal values; ValueError for what is not plain."""
    return marshal.dumps(values, 2)  # the version without references
