"""Signals as questions that the loop answers between two steps, when nothing is half done.

Ctrl-C and SIGTERM: save and end. SIGUSR1: save and go on, as batch systems ask before they take the machine.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sopdeploy.errors import TrainingError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE = signal.SIGUSR1


class StopRequested(Exception):  # noqa: N818  # no error: it never leaves `train`
    """Raised between two steps after a signal."""


class TrainingStoppedError(TrainingError):
    """The run was stopped by a signal and saved; `signal_number` is for the exit code."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Stop:
    """Remembers the signal that asked the run to stop, 0 is none, and whether one asked it to save."""

    signal_number = 0
    save_wanted = False

    def check(self) -> None:
        """Raise `StopRequested` if a signal has come."""
        if self.signal_number:
            raise StopRequested

    def asked_to_save(self) -> bool:
        """Say whether a signal has asked for a checkpoint since the last time."""
        asked, self.save_wanted = self.save_wanted, False
        return asked


@contextmanager
def watch_for_stop() -> Iterator[Stop]:
    """Turn signals into requests; a second Ctrl-C or SIGTERM acts as it did before.

    Outside the main thread Python delivers no signals, and nothing is watched.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, SAVE)}

    def restore(*numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, before[number])

    def remember(number: int, _frame: FrameType | None) -> None:
        stop.signal_number = number
        restore(*SIGNALS)

    def remember_to_save(_number: int, _frame: FrameType | None) -> None:
        stop.save_wanted = True

    for number in SIGNALS:
        signal.signal(number, remember)
    signal.signal(SAVE, remember_to_save)
    try:
        yield stop
    finally:
        restore(*before)
