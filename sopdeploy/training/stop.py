"""Ctrl-C and SIGTERM as a question that the loop answers between two steps, when nothing is half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sopdeploy.errors import TrainingError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):  # noqa: N818  # no error: it never leaves `train`
    """Raised between two steps after a signal."""


class TrainingStoppedError(TrainingError):
    """The run was stopped by a signal and saved; `signal_number` is for the exit code."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Stop:
    """Remembers the signal that asked the run to stop; 0 is none."""

    signal_number = 0

    def check(self) -> None:
        """Raise `StopRequested` if a signal has come."""
        if self.signal_number:
            raise StopRequested


@contextmanager
def watch_for_stop() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one acts as it did before.

    Outside the main thread Python delivers no signals, and nothing is watched.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, _frame: FrameType | None) -> None:
        stop.signal_number = number
        restore()

    for number in SIGNALS:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        restore()
