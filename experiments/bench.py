"""The cost of a training step: ``fewstep bench EXPERIMENT [key=value ...]``.

Efficiency = time of a period's network evaluations, replayed alone / time of the period's whole iterations. Both are
measured in turn in one run, since machines are noisy. The data are noise: only sizes matter. ``--memory``: the peak of
what one process holds with adapters and with copies, each in a process of its own. ``--versus``: both settings, each in
processes of its own. ``--sampling``: pictures from prompts to pixels, teacher and student.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.backbones.base import Backbone, Cond
from core.config import ExperimentConfig, UserError, compose, resolve
from core.data.batches import LatentData
from core.data.cache import LatentCache
from core.data.requests import Requests
from core.run import Run
from core.sampler import Setting, teacher_setting
from core.schema import check_range
from core.training.loop import Trainer
from experiments.build import build_backbone, build_clock, build_method, device_of, source_of
from experiments.memory import GB, planned_bytes
from experiments.session import Session

ITEMS = 64
ROUNDS = 2  # of processes, for each of two settings that are compared
MEMORY = [
    "dmd2/tiny", "backbone.path=random:sd-50m", "backbone.lora_rank=16", "backbone.lora_alpha=16", "train.batch_size=2",
    "execution.activation_checkpointing=true",
]  # fmt: skip


@dataclass
class Call:
    """One evaluation of a network as the method made it."""

    function: Callable[..., Tensor]
    role: str
    x_t: Tensor
    t: Tensor
    cond: Cond
    grad: bool
    through: bool  # the gradient goes on to x_t: the role only judges


class Recorder:
    """Notes the calls of a backbone's networks between ``start`` and ``stop``."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.calls, self.on = backbone, [], False
        for name in ("network", "network_features"):
            setattr(backbone, name, self._noting(getattr(backbone, name)))

    def _noting(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            if self.on:
                grad = torch.is_grad_enabled()
                self.calls.append(Call(function, role, x_t.detach(), t, cond, grad, grad and x_t.requires_grad))
            return function(role, x_t, t, cond)

        return call

    def replay(self) -> None:
        """Repeat the noted evaluations alone, with the backward passes that they had."""
        for call in self.calls:
            x_t = call.x_t.clone().requires_grad_(call.through)
            with torch.set_grad_enabled(call.grad), self.backbone._autocast(x_t):
                out = call.function(call.role, x_t, call.t, call.cond)
            if call.grad:
                inputs = [x_t] if call.through else list(self.backbone.role_parameters(call.role).values())
                trained = [value for value in inputs if value.requires_grad]
                out.float().square().mean().backward(inputs=trained)
                for value in trained:
                    value.grad = None


def noise_data(backbone: Backbone, config: ExperimentConfig) -> LatentData:
    """Latents of noise, and the conditioning of a few prompts."""
    rng = np.random.default_rng(0)
    prompts = ["", "red apple", "blue heart", "a dog"]
    cond = {name: value.cpu().numpy() for name, value in backbone.encode_text(prompts).tensors.items()}
    latents = rng.standard_normal((ITEMS, *backbone.latent_shape), dtype=np.float32)
    cache = LatentCache(latents, np.arange(ITEMS) % len(prompts), prompts, cond, ["noise"] * ITEMS, "noise")
    return LatentData(cache, config.seed, device_of(config))


def build(config: ExperimentConfig, folder: Path) -> Trainer:
    config.execution.runs_dir, config.execution.use_solution_store = str(folder), False
    config.train.budget.amount = 10**9  # it never ends
    backbone = build_backbone(config)
    method = build_method(config, backbone)
    run = Run.create(resolve(config))
    return Trainer(config, method, noise_data(backbone, config), run, build_clock(config), run.begin_attempt())


def measure(config: ExperimentConfig, repeats: int, stage: float) -> dict[str, Any]:
    """Images/s, evaluations an image by role, efficiency and peak memory, after one period to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(config, Path(folder))
        clock, backbone = trainer.clock, trainer.method.backbone
        clock.budget, clock.unit = 10**6, "iterations"
        recorder, length = Recorder(backbone), config.method.period
        start = int(stage * clock.budget) // length * length
        steps, networks, counted = [], [], Counter[str]()
        for repeat in range(repeats + 1):
            clock.iteration, clock.images = start, start * clock.batch_size
            recorder.calls, recorder.on = [], True
            before = Counter(backbone.evaluations)
            seconds = _timed(lambda: [trainer._iteration() for _ in range(length)], backbone.device)
            recorder.on = False
            alone = _timed(recorder.replay, backbone.device)
            if repeat:
                steps.append(seconds)
                networks.append(alone)
                counted = backbone.evaluations - before
    images = length * config.train.batch_size
    return {
        "experiment": config.name,
        "device": _device_name(backbone.device),
        "batch_size": config.train.batch_size,
        "images_per_s": images / median(steps),
        "evaluations_per_image": {role: count / images for role, count in sorted(counted.items())},
        "efficiency": median(n / s for n, s in zip(networks, steps, strict=True)),
        "peak_gb": peak_gb(backbone.device),
    }


def _timed(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _device_name(device: torch.device) -> str:
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


def peak_of_two_iterations(words: Sequence[str]) -> float:
    """GB that a training takes beside what the process held before it was built."""
    config = resolve(compose(words[0], words[1:]))
    before = held_gb() if device_of(config).type == "cpu" else 0.0
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(config, Path(folder))
        trainer._iteration()
        trainer._iteration()
    return peak_gb(trainer.method.backbone.device) - before


def _alone(words: Sequence[str]) -> str:
    """Output of this benchmark in a process of its own."""
    command = [sys.executable, "-m", "experiments.cli", "bench", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        how = f"exit code {done.returncode}"
        if done.returncode < 0:  # the system ends who takes too much memory, who then cannot say so
            how = f"ended by {signal.Signals(-done.returncode).name}"
        said = done.stderr.strip().splitlines()[-1:]
        raise UserError(": ".join([" ".join(words), how, *said]))
    return done.stdout


def compare_memory(words: Sequence[str]) -> dict[str, Any]:
    """Peak GB by ``backbone.sharing``, each measured in a process of its own, beside what ``plan-memory`` says."""
    found: dict[str, dict[str, float]] = {}
    for sharing in ("lora", "full"):
        setting = [*words, f"backbone.sharing={sharing}"]
        config = compose(setting[0], setting[1:])
        config.backbone.path = source_of(config)
        found[sharing] = {
            "measured_gb": float(_alone(["--peak", *setting]).split()[-1]),
            "planned_gb": planned_bytes(config, 1)[1] / GB,
        }
    ratio = {key: found["lora"][key] / found["full"][key] for key in found["lora"]}
    return found | {"ratio": ratio}


def versus(words: Sequence[str], others: Sequence[str], repeats: int, stage: float) -> dict[str, Any]:
    """Images/s and peak GB of both settings, and the second's over the first's: medians of processes in turn."""
    settings = {"first": list(words), "second": [*words, *others]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.json"
        for _ in range(ROUNDS):
            for name, setting in settings.items():
                _alone([*setting, "--repeats", str(repeats), "--stage", str(stage), "--out", str(file)])
                found[name].append(json.loads(file.read_text()))
    keys = ("images_per_s", "peak_gb")
    medians = {name: {key: median(one[key] for one in runs) for key in keys} for name, runs in found.items()}
    ratio = {key: medians["second"][key] / medians["first"][key] for key in keys}
    facts = {key: found["first"][0][key] for key in ("experiment", "device")}
    return {**facts, "versus": " ".join(others), **medians, "ratio": ratio}


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
            seconds = _timed(partial(session.sample, requests, setting), backbone.device)
            times[setting].append(seconds / len(requests))
    found = {setting: median(seconds) for setting, seconds in times.items()}
    teacher = found[settings[0]]
    return {
        "experiment": config.name,
        "device": _device_name(backbone.device),
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


def run_command(arguments: Namespace) -> int:
    """Measure what is asked for and print it."""
    words = [*(MEMORY if arguments.memory else ["flash/emoji"]), *arguments.overrides]
    if arguments.experiment:
        words = [arguments.experiment, *arguments.overrides]
    logging.getLogger("fewstep").setLevel(logging.WARNING)
    if arguments.peak:
        print(peak_of_two_iterations(words))
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


if __name__ == "__main__":
    from experiments.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
