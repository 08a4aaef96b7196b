"""Runs commands of the checkout on ``PYTHONPATH``, each in a process of its own: ``python -P replay.py JOBS.json``.

It knows a checkout by its command line alone, so that checkouts of any age can be run. Importing torch takes half a
minute: it is imported once, and each command is a fork of this process, as it is before anything was computed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

PRELOADED = ("experiments.train", "experiments.evaluate", "hydra", "timm")  # with all that they import
LIMIT_S = 300  # of one command
UNKNOWN_KEY = re.compile(r"unknown key '([^']+)'")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Exit code of a job, and the settings that it was run without because this checkout does not know them.

    A job has ``module`` and ``arguments`` (as after ``python -m``), ``folder`` to run in, and ``log`` for its output.
    """
    arguments, dropped = list(job["arguments"]), []
    while True:
        code = _forked(job["module"], arguments, Path(job["folder"]), Path(job["log"]))
        unknown = UNKNOWN_KEY.search(Path(job["log"]).read_text(errors="replace"))
        known = [word for word in arguments if unknown is None or not word.startswith(f"{unknown[1]}=")]
        if code == 0 or known == arguments:
            return {"code": code, "dropped": dropped}
        dropped.append(unknown[1])
        arguments = known


def _forked(module: str, arguments: list[str], folder: Path, log: Path) -> int:
    """The exit code of ``python -m module arguments``; that of a process that a signal has ended is negative."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(module, arguments, folder, log)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(module: str, arguments: list[str], folder: Path, log: Path) -> None:
    """Run the module in place of this process and leave."""
    code = 1
    try:
        signal.alarm(LIMIT_S)
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main(jobs_file: str) -> None:
    """Run the jobs of a file in their order; what became of each goes to ``results.json`` beside it."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # another checkout may keep it elsewhere; it only saves time
            importlib.import_module(name)
    results = {}
    for name, job in json.loads(Path(jobs_file).read_text()).items():
        begin = time.monotonic()
        results[name] = run(job)
        print(f"  {name}: exit code {results[name]['code']}, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    Path(jobs_file).with_name("results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
