"""Numbers of a step that only a GPU gives: the share of its peak, and memory."""

from __future__ import annotations

from typing import Any

import torch

from experiments.bench.blocks import counted_flops
from experiments.bench.contest import Duel
from experiments.bench.timing import peak_tflops
from experiments.memory import GB


def beside_on_gpu(duel: Duel, found: dict[str, Any]) -> dict[str, Any]:
    """``mfu``: operations of the step's evaluations over time and peak; ``peak_gb``: of all that the process holds.

    Empty on a CPU, and for a GPU whose peak is not known the share is None.
    """
    if duel.device.type != "cuda" or duel.recorder is None:
        return {}
    torch.cuda.reset_peak_memory_stats(duel.device)
    duel.ours.run(0)
    gigabytes = torch.cuda.max_memory_allocated(duel.device) / GB
    tflops = tflops_of(duel, found["ours"]["images_per_s"])
    peak = peak_tflops(torch.cuda.get_device_name(duel.device), duel.dtype)
    return {"tflops": tflops, "mfu": tflops / peak if peak else None, "peak_gb": gigabytes}


def tflops_of(duel: Duel, images_per_s: float) -> float:
    """TFLOP/s of our step: those of its evaluations, replayed once, at its speed."""
    return counted_flops(duel.recorder.replay) / duel.images * images_per_s / 1e12
