"""Handle signals between two training steps.

Ctrl-C and SIGTERM save the run and end it. With several processes, a signal to one of them takes effect in
all after the same step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch

from sopdeploy.errors import TrainingError
from sopdeploy.evaluation.prediction import ProcessGroup

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStoppedError(TrainingError):
    """The run was stopped between two steps by the signal `signal_number`; `message` says what is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number  # as shells expect


@dataclass(slots=True)
class SignalState:
    """The stop signals that this process has received; in `exchange`, all processes learn about them."""

    processes: ProcessGroup
    received: set[int] = field(default_factory=set)

    def exchange(self, *, save_due: bool = False) -> bool:
        """Exchange the signals of all processes, which must call this the same number of times.

        Returns whether *save_due* is true in one of them; raises `TrainingStoppedError` if one was stopped.
        """
        flags = [number in self.received for number in STOP_SIGNALS] + [save_due]
        *counts, due_count = self.processes.all_reduce(torch.tensor(flags).int()).tolist()
        for number, count in zip(STOP_SIGNALS, counts, strict=True):
            if count:
                raise TrainingStoppedError(number)
        return bool(due_count)


@contextmanager
def handle_signals(processes: ProcessGroup) -> Iterator[SignalState]:
    """Record signals instead of acting on them; the second stop signal calls the previous handler.

    With several processes, all signals are only recorded: torchrun and the batch system often both send one,
    and the second one must not end a process that is saving. torchrun kills processes that take too long.
    Outside the main thread, where Python delivers no signals, no handlers are installed.
    """
    state = SignalState(processes)
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def record(number: int, _frame: FrameType | None) -> None:
        state.received.add(number)
        if processes.world == 1:  # the previous handlers receive the next signal
            for stop in STOP_SIGNALS:
                signal.signal(stop, previous[stop])

    for number in previous:
        signal.signal(number, record)
    try:
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
