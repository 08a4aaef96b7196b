"""The command ``fewstep bench``: measure what is asked for and print it."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from core.config import compose, resolve
from core.schema import check_range
from experiments.bench.alone import versus
from experiments.bench.peaks import MEMORY, compare_memory, peak_of_two_iterations
from experiments.bench.sampling import sampling
from experiments.bench.step import measure
from experiments.bench.table import keep, measure_table


def run_command(arguments: Namespace) -> int:
    """Measure what is asked for and print it."""
    words = [*(MEMORY if arguments.memory else ["flash/emoji"]), *arguments.overrides]
    if arguments.experiment:
        words = [arguments.experiment, *arguments.overrides]
    logging.getLogger("fewstep").setLevel(logging.WARNING)
    if arguments.peak:
        print(peak_of_two_iterations(words))
        return 0
    if not (arguments.experiment or arguments.memory or arguments.versus or arguments.sampling):
        found = measure_table(arguments.only, arguments.repeats, partial(print, flush=True))
        if arguments.out:
            keep(found, arguments.out)
        return 0
    found = _measured(arguments, words)
    for key, value in found.items():
        print(f"{key:<24}{_text(value)}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _measured(arguments: Namespace, words: Sequence[str]) -> dict[str, Any]:
    if arguments.memory:
        return compare_memory(words)
    if arguments.versus:
        return versus(words, arguments.versus, arguments.repeats, arguments.stage)
    config = resolve(compose(words[0], words[1:]))
    if arguments.sampling:
        for steps in (*arguments.sampling, arguments.teacher_steps):
            check_range("steps", steps, 1)
        return sampling(config, arguments.sampling, arguments.teacher_steps, arguments.repeats)
    return measure(config, arguments.repeats, arguments.stage)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_text(one)}" for key, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
