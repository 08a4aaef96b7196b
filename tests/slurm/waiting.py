"""Waiting for what a cluster does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait(holds: Callable[[], bool], timeout_s: float = 300) -> None:
    """Until ``holds()``; AssertionError after ``timeout_s``, by when a slow machine is a hung one."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.5)
