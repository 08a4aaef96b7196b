"""The doctor's job, which looks at a cluster from inside. submitit pickles it: it holds texts and numbers alone."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

PING_S = 60


@dataclass
class Report:
    """Checks of one process. ``file`` with ``token`` was written where the job was submitted; ``gpus``: its share."""

    file: str
    token: str
    gpus: int

    def __call__(self) -> dict[str, Any]:
        """The host's name and (ok, text) of each finding."""
        from ablations.job import launcher

        os.environ |= launcher(os.environ)
        findings = [self._folder(), self._python()]
        if findings[-1][0]:
            findings += [self._devices(), self._ping()]
        return {"host": os.environ.get("SLURMD_NODENAME", platform.node()), "findings": findings}

    def _folder(self) -> tuple[bool, str]:
        try:
            same = Path(self.file).read_text() == self.token
        except OSError:
            same = False
        folder = Path(self.file).parents[1]
        return same, f"sees {folder}" if same else f"does not see {folder}; set shared_dir to a folder on every node"

    @staticmethod
    def _python() -> tuple[bool, str]:
        try:
            torch = importlib.import_module("torch")
            importlib.import_module("experiments.train")
        except ImportError as error:
            return False, f"{sys.executable} cannot import what training needs ({error}); set python or setup"
        return True, f"Python {platform.python_version()}, torch {torch.__version__}"

    def _devices(self) -> tuple[bool, str]:
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found == self.gpus:
            return True, f"{found} GPUs visible, as asked for" if self.gpus else "no GPU asked for"
        return False, f"{found} GPUs visible, {self.gpus} asked for; driver, container or gres settings are at fault"

    def _ping(self) -> tuple[bool, str]:
        """Add up rank + 1 over all processes."""
        import torch
        import torch.distributed as dist

        backend, size = ("nccl" if self.gpus else "gloo"), int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return True, "one process; nobody to ping"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=PING_S))
            value = torch.tensor(float(dist.get_rank() + 1), device="cuda" if self.gpus else "cpu")
            dist.all_reduce(value)
            got = value.item()
            dist.destroy_process_group()
        except Exception as error:  # whatever the transport says
            return False, f"{backend} between the nodes fails: {str(error).splitlines()[0]}; see NCCL_SOCKET_IFNAME"
        want = size * (size + 1) / 2
        return got == want, f"{backend} between {size} processes: {got:g} of {want:g}"
