"""Pictures from prompts to pixels, teacher and student in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from core.config import ExperimentConfig
from core.data.requests import Requests
from core.sampler import Setting, teacher_setting
from experiments.bench.timing import device_name, timed
from experiments.build import build_backbone, build_method
from experiments.session import Session


def sampling(config: ExperimentConfig, steps: Sequence[int], teacher_steps: int, repeats: int) -> dict[str, Any]:
    """Seconds for an image, text encoder and VAE included, one batch of ``eval.batch_size`` at a time."""
    backbone = build_backbone(config)
    session = Session(config, build_method(config, backbone, training=False), 0)
    settings = [
        teacher_setting(teacher_steps, config.method.teacher_guidance),
        *(Setting("student", config.eval.sampler_at(count)) for count in steps),
    ]
    requests = Requests(("red apple",) * config.eval.batch_size)
    nfe = {setting: session.sample(requests, setting).cost.nfe for setting in settings}  # warms up, too
    times: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for _ in range(repeats):
        for setting in settings:  # in turn: machines are noisy
            seconds = timed(partial(session.sample, requests, setting), backbone.device)
            times[setting].append(seconds / len(requests))
    found = {setting: median(seconds) for setting, seconds in times.items()}
    teacher = found[settings[0]]
    return {
        "experiment": config.name,
        "device": device_name(backbone.device),
        "batch_size": len(requests),
        **{
            f"{how.weights}, {how.sampler.steps} steps": {
                "nfe": nfe[how],
                "seconds": seconds,
                "speedup": teacher / seconds,
            }
            for how, seconds in found.items()
        },
    }
