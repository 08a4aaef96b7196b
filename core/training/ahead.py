"""Rollouts that read stored teacher solutions, and the solving of problems that lie ahead.

While another process solves what this one needs, or to fill a larger batch of the teacher, problems of later
iterations are solved now: a rollout is a pure function of its batch and the clock, so that of a later iteration can be
asked for at any time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import numpy as np

from core.data.batches import Batch, LatentData
from core.data.solutions import Busy
from core.methods.base import Method, Rollout
from core.methods.clock import Clock
from core.training.world import World

BUSY_POLL_S = 0.02


class Ahead:
    """Makes the rollouts of one training. ``solve_batch``: problems to be solved together, at least a micro-batch."""

    def __init__(
        self, method: Method, data: LatentData, clock: Clock, micro_batch: int, solve_batch: int | None, world: World
    ) -> None:
        self.method, self.data, self.clock, self.world = method, data, clock, world
        self.micro_batch, self.solve_batch = micro_batch, max(solve_batch or 0, micro_batch)

    def rollout(self, micro: Batch) -> Rollout:
        """The rollout of a micro-batch of this iteration; waits for solutions that another process is computing."""
        while True:
            try:
                if self._should_solve_more_than(micro):
                    self._solve_next(self.clock)
                return self.method.rollout(micro, self.clock)
            except Busy:
                later = copy.deepcopy(self.clock)
                later.advance()
                if not self._solve_next(later):
                    time.sleep(BUSY_POLL_S)

    def _should_solve_more_than(self, micro: Batch) -> bool:
        """Whether its teacher solutions are missing and those of later iterations are to be solved with them."""
        if self.solve_batch == self.micro_batch or self.method.solutions is None:
            return False
        return self.method.problem_stage(self.clock) is not None and not self.method.solutions.has(micro.positions)

    def _solve_next(self, clock: Clock) -> bool:
        """Solve the first problems from ``clock`` on that nobody has or is solving; whether there were any."""
        for positions, then in self._unsolved(clock):
            try:
                with self.method.backbone.uncounted() as evaluations:
                    self.method.rollout(self.data.batch(positions), then)
            except Busy:
                continue
            self.clock.spend_ahead(evaluations.total())
            return True
        return False

    def _unsolved(self, clock: Clock) -> Iterator[tuple[np.ndarray, Clock]]:
        """Positions without a stored solution and their clock: micro-batches, joined where they may be solved at once.

        They follow each other in one stage of the problems and in one block of ``solve_batch`` positions. Blocks are
        the same for every process: what is solved together decides the last digits.
        """
        found: list[np.ndarray] = []
        first = clock
        for positions, then in self._unsolved_micro_batches(clock):
            if found and self._joins(found, positions, first, then):
                found.append(positions)
                continue
            if found:
                yield np.concatenate(found), first
            found, first = [positions], then
        if found:
            yield np.concatenate(found), first

    def _joins(self, found: list[np.ndarray], positions: np.ndarray, first: Clock, then: Clock) -> bool:
        follows = positions[0] == found[-1][-1] + 1
        in_block = positions[0] // self.solve_batch == found[0][0] // self.solve_batch
        return follows and in_block and self.method.problem_stage(then) == self.method.problem_stage(first)

    def _unsolved_micro_batches(self, clock: Clock) -> Iterator[tuple[np.ndarray, Clock]]:
        solutions, clock = self.method.solutions, copy.deepcopy(clock)
        while not clock.done:
            positions = self.world.share(clock.positions())
            if self.method.problem_stage(clock) is not None and not solutions.has(positions):
                for micro in np.split(positions, len(positions) // self.micro_batch):
                    if not solutions.has(micro):
                        yield micro, copy.deepcopy(clock)
            clock.advance()
