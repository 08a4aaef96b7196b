"""Train several runs in one process on one frozen base: ``python -m experiments.pack FILE``.

Each run keeps its folder, lock, log, checkpoints, curve and measurements, and its numbers are those that it has when it
trains alone. Their iterations alternate: next comes the run that has seen the fewest images. So those that were stopped
at different positions meet, and whatever depends on the teacher, the data and the keyed draws alone is computed once
for all (``core.data.memory``). One signal lets all save their state; a run that diverges or fails leaves the others.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core.backbones.pipeline import PipelineBackbone
from core.config import ExperimentConfig, UserError
from core.data.memory import Memory
from core.run import Run, disk_errors
from core.training.loop import Diverged, Trainer
from core.training.preemption import Preempted, PreemptionFlag
from experiments.attempts import heading
from experiments.build import build_backbone, build_task, sharing_of
from experiments.needs import check_needs
from experiments.packing import check_base, read_pack
from experiments.quiet import quieten
from experiments.session import own_requests
from experiments.train import (
    DONE,
    FAILED,
    PREEMPTED,
    STATES,
    already_done,
    begin,
    ended_by,
    iterations,
    log,
    logging_to,
)


@dataclass
class Member:
    """One run of a pack. ``code``: its exit code, once it has ended; ``logs`` get its lines beside its own log."""

    run: Run
    logs: Sequence[Path] = ()
    code: int | None = None
    trainer: Trainer | None = None
    attempt: int = 0
    life: Iterator[None] = field(default_factory=lambda: iter(()))
    locks: ExitStack = field(default_factory=ExitStack)

    @property
    def images(self) -> int:
        return 0 if self.trainer is None else self.trainer.clock.images

    def advance(self) -> None:
        """Do the next part of its life, an iteration; an error ends this run alone."""
        self._under_its_log(lambda: next(self.life))

    def stop(self) -> None:
        """Save its state, as a signal asks for."""
        assert self.trainer is not None
        self._under_its_log(self.trainer.leave)
        self.life.close()

    def _under_its_log(self, work: Callable[[], object]) -> None:
        with logging_to(self.run, *self.logs, name=self.run.id):
            try:
                work()
            except StopIteration:
                self._end(DONE)
            except (Preempted, Diverged) as reason:
                self._end(*ended_by(reason, self.run))
            except UserError as error:
                log.error("error: %s", error)
                self._end(FAILED, str(error), "failed")
            except Exception as error:
                log.error("%s", traceback.format_exc().rstrip())
                self._end(FAILED, f"{type(error).__name__}: {error}".splitlines()[0], "failed")

    def _end(self, code: int, reason: str = "", state: str = "") -> None:
        self.code, self.trainer = code, None
        if self.attempt:
            self.run.end_attempt(state or STATES[code], reason)
        self.locks.close()  # others may use what is done while the rest goes on

    def interrupted(self, error: BaseException) -> None:
        """Note that the whole process was interrupted."""
        self._end(PREEMPTED, type(error).__name__)


class Pack:
    """Runs that are trained together, each from where its last attempt has left it."""

    def __init__(self, evaluate: bool) -> None:
        self.evaluate = evaluate
        self.memory, self.flag = Memory(), PreemptionFlag()
        self.members: list[Member] = []
        self.backbone: PipelineBackbone | None = None

    @property
    def active(self) -> list[Member]:
        return [member for member in self.members if member.code is None]

    def add(self, config: ExperimentConfig, logs: Sequence[Path] = ()) -> Member:
        """A member that has not begun."""
        member = Member(Run.create(config), logs)
        member.life = self._life(member, config)
        self.members.append(member)
        return member

    def _life(self, member: Member, config: ExperimentConfig) -> Iterator[None]:
        """Everything that is done for one run; it pauses when it is claimed, when it is built, at each iteration."""
        run = member.run
        check_needs(config, evaluate=self.evaluate)
        own_requests(config, build_task(config))
        member.locks.enter_context(run.lock())
        if run.state() == "diverged":
            raise Diverged(run.reason())
        if run.state() == "done":
            already_done(config, run, self.evaluate)
            return
        yield
        others = [other.run.id for other in self.members if other is not member]
        member.attempt = run.begin_attempt(device=config.execution.device, processes=1, packed_with=others)
        view = self._base(config).view(run.id, sharing_of(config))
        trainer, session = begin(config, run, member.attempt, view, memory=self.memory, flag=self.flag)
        member.trainer = trainer
        yield
        yield from iterations(trainer, session, self.evaluate, lambda: self._pause(trainer))

    def _base(self, config: ExperimentConfig) -> PipelineBackbone:
        """The base of all, loaded for the first that is built."""
        if self.backbone is None:
            self.backbone = build_backbone(config)
        return self.backbone

    def _pause(self, measured: Trainer) -> None:
        """Between two measurements of one run the others tell that they live, and all may be told to leave."""
        if self.flag.raised:
            measured.leave()
        self._beat()

    def _beat(self) -> None:
        for member in self.active:
            if member.trainer is not None:
                member.trainer.monitor.tick()

    def train(self) -> None:
        """Train all to their ends. What is done already is measured before the base takes memory."""
        with self.flag.watching():
            try:
                for _ in ("claimed", "built"):
                    for member in self.active:
                        member.advance()
                while self.active:
                    self._next()
            except BaseException as error:
                for member in self.active:
                    member.interrupted(error)
                raise

    def _next(self) -> None:
        """One iteration of the run that is behind; of equals another one is first, and solves for all, each time."""
        if self.flag.raised:
            for member in self.active:
                member.stop()
            return
        min(self.active, key=self._turn).advance()
        self._beat()
        self.memory.forget(min((member.images for member in self.active), default=0))

    def _turn(self, member: Member) -> tuple[int, int]:
        assert member.trainer is not None
        shift = self.members.index(member) - member.trainer.clock.iteration
        return member.images, shift % len(self.members)


def train_pack(
    configs: Sequence[ExperimentConfig], logs: Sequence[Sequence[Path]] = (), *, evaluate: bool = False
) -> int:
    """Exit code of a pack: 75 if one was stopped with its state saved, else 0 if one is done, else 1."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: a pack of runs trains in one process; allowed: 1")
    check_base(configs)
    if configs[0].execution.num_threads:
        torch.set_num_threads(configs[0].execution.num_threads)
    pack = Pack(evaluate)
    for number, config in enumerate(configs):
        pack.add(config, logs[number] if logs else ())
    pack.train()
    codes = [member.code for member in pack.members]
    return PREEMPTED if PREEMPTED in codes else DONE if DONE in codes else FAILED


def main(argv: Sequence[str]) -> int:
    """Train the runs that a file names, as ``fewstep grid run --pack`` writes it; the exit code of ``train_pack``."""
    parser = ArgumentParser(prog="python -m experiments.pack", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--evaluate", action="store_true")
    arguments = parser.parse_args(argv)
    quieten()
    try:
        entries = read_pack(arguments.file)
        logs = [_begun(entry.log) for entry in entries]
        return train_pack([entry.config() for entry in entries], logs, evaluate=arguments.evaluate)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _begun(log: str) -> list[Path]:
    """The log in which this attempt has its heading; none where none was named."""
    if not log:
        return []
    file = Path(log)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(heading(os.environ))
    return [file]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
