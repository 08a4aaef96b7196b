"""Seconds of a call, and the memory that a process holds."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from experiments.memory import GB


def timed(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def peak_gb(device: torch.device) -> float:
    """Most memory so far: what the allocator gave out on CUDA, what the process held on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def held_gb() -> float:
    """Memory that the process holds now, in GB; on systems that do not tell, the most that it has held."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_gb(torch.device("cpu"))
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024 / GB


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of repeated measurements."""
    return {"median": median(values), "low": min(values), "high": max(values)}


# Dense matrix products of GPUs, from their data sheets, in TFLOP/s; fp32 without TF32, as the table's fp32 rows run
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H200": {"bf16": 989, "fp32": 67}, "H100 PCIe": {"bf16": 756, "fp32": 51}, "H100": {"bf16": 989, "fp32": 67},
    "A100": {"bf16": 312, "fp32": 19.5}, "L40S": {"bf16": 362, "fp32": 91.6}, "B200": {"bf16": 2250, "fp32": 75},
}  # fmt: skip


def peak_tflops(device: str, dtype: str) -> float | None:
    """The peak of a GPU by its name; None for one that is not listed."""
    return next((peaks[dtype] for name, peaks in PEAK_TFLOPS.items() if name in device), None)
