"""The machine that numbers come from, and the one core that they are measured on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from core.backbones.precision import lacks_units_for_16_bits
from core.provenance import head, package_versions

UNITS_FOR_16_BITS = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "asimdhp")  # x86, then Arm


def pin_to_one_core() -> int | None:
    """Keep this process and those that it starts on one core, where the system can; return the core's number."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def machine(device: torch.device) -> dict[str, Any]:
    """CPU or GPU, its units for 16-bit numbers, versions, commit and day."""
    model, flags = _cpu()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "units_for_16_bits": [flag for flag in UNITS_FOR_16_BITS if flag in flags],
        "widened_products": device.type == "cpu" and lacks_units_for_16_bits(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "commit": head(),
        "measured": datetime.now(UTC).date().isoformat(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["gpu_memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return found


def _cpu() -> tuple[str, set[str]]:
    """Model and flags of the first CPU; what Python knows where Linux does not tell."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor(), set()
    fields = {}
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.processor()), set(flags.split())
