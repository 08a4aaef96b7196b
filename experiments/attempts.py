"""The line with which each attempt begins in a log that several of them append to. Torch-free."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping

HEADING = re.compile(r"^--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d job ", re.MULTILINE)


def heading(environment: Mapping[str, str]) -> str:
    """The first line of an attempt: when it began, and its job in SLURM or else the process that starts it."""
    return f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} job {environment.get('SLURM_JOB_ID', os.getpid())}\n"
