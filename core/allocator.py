"""The C library's memory: kept for the next tensor instead of given back to the system.

glibc maps each large block anew and unmaps it when a tensor dies, so that a training step on the CPU asks the system
for every activation again, page by page: 6 to 9% of a step of the embedded teacher's network.
"""

from __future__ import annotations

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**30  # bytes of a block that is taken from kept memory


@functools.cache
def keep_freed_memory() -> bool:
    """Have this process keep what tensors free, up to its peak; whether the C library does (glibc alone)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
