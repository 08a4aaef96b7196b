"""A signal only sets a flag; the loop reads it at a step boundary, saves and leaves (a save in a handler deadlocks)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 75  # of a training that has saved its state and goes on later; no error (sysexits.h, EX_TEMPFAIL)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Preempted(Exception):  # noqa: N818  not an error: the run goes on in its next attempt
    """The run was asked to stop and has saved its state."""


class PreemptionFlag:
    """True once a signal has arrived; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.raised = False

    def _handle(self, number: int, frame: object) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True

    @contextmanager
    def watching(self) -> Iterator[PreemptionFlag]:
        """Install the handlers, and restore the previous ones."""
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
