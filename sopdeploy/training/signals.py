"""Signals as questions that the loop answers between two steps, when nothing is half done.

Ctrl-C and SIGTERM: save and end. SIGUSR1: save and go on, as batch systems ask before they take the machine.
Where several processes train, what one of them is asked all of them do, after the same step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from sopdeploy.errors import TrainingError
from sopdeploy.evaluation.prediction import ProcessGroup

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
    """What all processes agreed on: the signal that asked the run to stop, 0 is none, and whether to save."""

    signal_number = 0
    save_wanted = False

    def __init__(self, processes: ProcessGroup) -> None:
        self.processes = processes
        self.heard: set[int] = set()

    def check(self, *, save: bool = False) -> None:
        """Raise `StopRequested` if any process was asked to stop; *save* asks all of them for a checkpoint.

        Every process must call it equally often.
        """
        here = [number in self.heard for number in (*SIGNALS, SAVE)]
        self.heard.discard(SAVE)
        *stops, saves = self.processes.all_reduce(torch.tensor([*here[:-1], here[-1] or save]).int()).tolist()
        self.save_wanted = self.save_wanted or bool(saves)
        self.signal_number = next((number for number, asked in zip(SIGNALS, stops, strict=True) if asked), 0)
        if self.signal_number:
            raise StopRequested

    def asked_to_save(self) -> bool:
        """Say whether a checkpoint was asked for since the last time."""
        asked, self.save_wanted = self.save_wanted, False
        return asked


@contextmanager
def watch_for_stop(processes: ProcessGroup) -> Iterator[Stop]:
    """Turn signals into requests; a second Ctrl-C or SIGTERM acts as it did before.

    Not so where several processes train: torchrun and a batch system both pass on the same signal, and
    torchrun kills what takes too long. Outside the main thread Python delivers no signals, and nothing is
    watched.
    """
    stop = Stop(processes)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, SAVE)}

    def restore(*numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, before[number])

    def remember(number: int, _frame: FrameType | None) -> None:
        stop.heard.add(number)
        if number != SAVE and processes.world == 1:
            restore(*SIGNALS)

    for number in before:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        restore(*before)
