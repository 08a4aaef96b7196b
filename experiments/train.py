"""Train one experiment to the end of its budget, measuring where ``eval.at`` says (``fewstep train``)."""

from __future__ import annotations

import gc
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.backbones.base import Backbone
from core.config import ExperimentConfig, compose, resolve
from core.data.memory import Memory
from core.methods.base import Method
from core.run import Run, atomic_write
from core.sampler import Setting
from core.training.loop import Diverged, Trainer
from core.training.monitor import AboveBar
from core.training.preemption import EXIT_CODE as PREEMPTED
from core.training.preemption import Preempted, PreemptionFlag
from core.training.trackers import Trackers
from core.training.world import ALONE, World, check_processes, is_sharded
from experiments.build import (
    build_backbone,
    build_clock,
    build_data,
    build_method,
    build_task,
    device_of,
)
from experiments.dataset import shown_view
from experiments.needs import check_needs
from experiments.session import Session, own_requests, sheet_requests
from experiments.sheet import contact_sheet

log = logging.getLogger("fewstep")
DONE, FAILED = 0, 1  # exit codes, beside that of a preempted training
STATES = {DONE: "done", FAILED: "diverged", PREEMPTED: "stopped"}


def train(experiment: str, overrides: Sequence[str] = (), *, evaluate: bool = False) -> int:
    """Exit code of ``fewstep train``: 0 done, 1 failed or diverged, 75 stopped with its state saved."""
    return train_config(resolve(compose(experiment, overrides)), evaluate=evaluate)


def train_config(config: ExperimentConfig, *, evaluate: bool = False) -> int:
    """``train`` of a resolved configuration, by as many processes as the launcher has started."""
    if config.execution.num_threads:
        torch.set_num_threads(config.execution.num_threads)
    check_needs(config, evaluate=evaluate)
    own_requests(config, build_task(config))
    world = World.join(device_of(config))
    check_processes(config, world.size)
    with world.main_first():
        run = Run.create(config)
    with _owning(run) if world.is_main else nullcontext():
        if world.any(world.is_main and run.state() == "done"):
            return already_done(config, run, evaluate) if world.is_main else 0
        attempt = run.begin_attempt(device=config.execution.device, processes=world.size) if world.is_main else 0
        code, reason = _attempt(config, run, attempt, evaluate, world)
        if world.is_main:
            run.end_attempt(STATES[code], reason)
    world.leave()
    return code


def already_done(config: ExperimentConfig, run: Run, evaluate: bool) -> int:
    """Exit code for a run that is trained already: with ``evaluate`` it gets what it lacks."""
    log.info("%s is done: %s", run.id, run.path)
    return _evaluate(config, run) if evaluate else DONE


def _attempt(config: ExperimentConfig, run: Run, attempt: int, evaluate: bool, world: World) -> tuple[int, str]:
    """Exit code and reason; what is neither a stop nor a divergence is noted as failed and raised."""
    try:
        _train(config, run, attempt, evaluate, world)
        if evaluate and world.is_main and _is_sharded(config, world):
            gc.collect()  # the main process will hold the snapshot whole, where the training held its parts
            _evaluate(config, run)
    except (Preempted, Diverged) as reason:
        return ended_by(reason, run)
    except BaseException as error:
        if world.is_main:  # an interrupt while the data is read leaves work, no failure
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            run.end_attempt(state, f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    return DONE, ""


def ended_by(reason: Preempted | Diverged, run: Run) -> tuple[int, str]:
    """Exit code and reason of a training that was stopped, or has diverged."""
    if isinstance(reason, Preempted):
        log.info("%s", reason)
        return PREEMPTED, str(reason)
    log.error("%s diverged: %s", run.id, reason)
    return FAILED, str(reason)


def _train(config: ExperimentConfig, run: Run, attempt: int, evaluate: bool, world: World) -> None:
    with world.main_first():
        backbone = build_backbone(config, to_be_sharded=_is_sharded(config, world))
    if not config.method.trains:
        session = Session(config, build_method(config, backbone), 0)
        if evaluate and world.is_main:
            _measure_afterwards(session, run)
        return
    trainer, session = begin(config, run, attempt, backbone, world)
    for _ in iterations(trainer, session, evaluate):
        pass


def begin(
    config: ExperimentConfig,
    run: Run,
    attempt: int,
    backbone: Backbone,
    world: World = ALONE,
    *,
    memory: Memory | None = None,
    flag: PreemptionFlag | None = None,
) -> tuple[Trainer, Session]:
    """A trainer where the run's last attempt has left it, and a session that samples its student.

    ``memory`` and ``flag`` are shared by all that is trained in this process.
    """
    if world.is_main:
        run.heartbeat({"reading": "latents, computed once"})
    with world.main_first():
        data = build_data(config, backbone)
    method = build_method(config, backbone, data, lockstep=_is_sharded(config, world), memory=memory)
    if world.is_main:
        run.note(trainable_parameters=_trainable(method), shown_view=shown_view(config))
    session, clock = Session(config, method, 0), build_clock(config)
    trainer = Trainer(config, method, data, run, clock, attempt, _sheet(session, run, world), world, flag)
    backbone.release_text_encoders()
    log.info("%s  %s -> %s", run.id, config.name, run.path)
    return trainer, session


def iterations(
    trainer: Trainer, session: Session, evaluate: bool, pause: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Train to each fraction at which a snapshot is kept, and with ``evaluate`` measure there.

    Others may train after each iteration; ``pause`` is called between two measurements.
    """
    config, world = trainer.config, trainer.world
    with closing(trainer.monitor):
        for until in sorted({*config.eval.at, 1.0}):
            yield from trainer.iterations(until)
            trainer.snapshot()
            if evaluate and world.is_main and until in config.eval.at and not trainer.sharded:
                session.images = trainer.clock.images
                trainer.monitor.measured(_measure(session, trainer.run, pause))
                trainer.method.backbone.release_text_encoders()
    counters = trainer.clock.counters(world.total)
    if world.is_main:
        _report_cost(counters)


def _is_sharded(config: ExperimentConfig, world: World) -> bool:
    return config.method.trains and is_sharded(config.execution, world.size)


def _trainable(method: Method) -> dict[str, int]:
    """Parameters that are trained, by player."""
    return {player.name: sum(p.numel() for p in player.parameters.values()) for player in method.players()}


def _evaluate(config: ExperimentConfig, run: Run) -> int:
    """Measure what a finished run lacks, and draw its last sheet if there is none."""
    from experiments.session import load_run

    session, _ = load_run(run.path)
    session.config.eval, session.config.execution = config.eval, config.execution
    _measure_afterwards(session, run)
    if session.config.method.trains and not _sheet_path(run, session.images).exists():
        _sheet(session, run, ALONE)(session.images)
    return 0


def _measure_afterwards(session: Session, run: Run) -> None:
    """Measure when the training is over, or where there was none."""
    iteration = max((line["iteration"] for line in run.metrics()), default=0)
    with closing(Trackers(run, session.config.execution.report_to, iteration)) as trackers:
        trackers.scalars(_measure(session, run), iteration)


def _measure(session: Session, run: Run, pause: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Measure what is missing; the values of all wanted metrics by the names that trackers show them under."""
    from experiments.evaluate import evaluate

    def say(text: str) -> None:
        pause()
        log.info("measuring %s", text)
        run.heartbeat({"measuring": text})

    return {
        f"{line['split']}/{line['weights']} {line['steps']} steps/{line['metric']}": line["value"]
        for line in evaluate(session, run, say)
    }


def _sheet(session: Session, run: Run, world: World) -> Callable[[int], Path | None]:
    """Draws teacher, student and EMA on fixed prompts and fixed noise, to samples/<images>.png of the main process."""
    config = session.config
    requests = sheet_requests(config, session.task)
    session.encode_now(requests)
    teacher = session.method.teacher_setting
    own = [
        Setting(weights, config.eval.sampler_at(steps))
        for weights in ("student", "ema")[: 1 + (config.train.ema_decay > 0)]
        for steps in dict.fromkeys((max(config.eval.steps), min(config.eval.steps)))
    ]
    drawn: list[np.ndarray] = []  # the teacher's pictures never change

    def draw(images_seen: int) -> Path | None:
        if not drawn:
            drawn.append(session.sample(requests, teacher).images)
        images = [*drawn, *(session.sample(requests, setting).images for setting in own)]
        if not world.is_main:
            return None
        path, encoded = _sheet_path(run, images_seen), io.BytesIO()
        sheet = contact_sheet(requests.texts, [setting.label for setting in (teacher, *own)], np.stack(images, axis=1))
        sheet.save(encoded, "png")
        atomic_write(path, encoded.getvalue())  # a report reads it while the run trains
        return path

    return draw


def _sheet_path(run: Run, images: int) -> Path:
    return run.path / "samples" / f"{images:010d}.png"


def _report_cost(counters: dict[str, Any]) -> None:
    counts = "  ".join(f"{role} {count:,}" for role, count in sorted(counters["evaluations"].items()))
    stored = f"{counters['stored']:,}, of which this run had put there {counters['ahead']:,}"
    log.info("network evaluations by role: %s  (read from the store: %s)", counts, stored)
    log.info("device-hours: %.4f", counters["seconds"] / 3600)


class Named(logging.Formatter):
    """Lines with their time; where the lines of several runs meet, each also has the ``name`` of its own."""

    def __init__(self, name: str = "") -> None:
        super().__init__("%(asctime)s  %(message)s", "%H:%M:%S")
        self.name = name

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if self.name in text else f"{self.name}  {text}"


@contextmanager
def _owning(run: Run) -> Iterator[None]:
    """No other process trains the run, and its log is written."""
    with run.lock(), logging_to(run):
        yield


@contextmanager
def logging_to(run: Run, *others: Path, name: str = "") -> Iterator[None]:
    """Log to the run's log.txt, to ``others``, and to the terminal, where ``name`` begins each line that lacks it.

    Anything that is logged afterwards is none of this run's.
    """
    before, propagate = list(log.handlers), log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    files = [logging.FileHandler(file, delay=True) for file in (run.path / "log.txt", *others)]
    log.handlers[:] = [AboveBar(sys.stderr), *files]
    for handler in log.handlers:
        handler.setFormatter(Named())
    log.handlers[0].setFormatter(Named(name))
    try:
        yield
    finally:
        for file in files:
            file.close()
        log.handlers[:], log.propagate = before, propagate


if __name__ == "__main__":
    from experiments.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
