"""Report the progress of a TensorRT build."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[str], None]


@contextmanager
def interrupts_recorded() -> Iterator[threading.Event]:
    """Set an event on Ctrl-C instead of raising `KeyboardInterrupt`, which is then raised at the end.

    An exception must not reach the C++ code of TensorRT, which prints it and continues or fails: a signal
    that arrives there would be raised in the next callback, before its first line.
    """
    interrupt = threading.Event()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    replaced = usual and threading.current_thread() is threading.main_thread()
    if replaced:
        signal.signal(signal.SIGINT, lambda *_: interrupt.set())
    try:
        yield interrupt
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupt.is_set():
            raise KeyboardInterrupt


def make_monitor(trt: Any, report: Report, interrupt: threading.Event) -> Any:
    """Create a progress monitor, which ends the build after an *interrupt*.

    A `KeyboardInterrupt` of *report* is such an interrupt.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        """Report every step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: list[str] = []  # from the outermost to the innermost
            self._begin = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Begin a phase."""
            del parent_phase, num_steps
            self._phases.append(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Complete a step; False stops the build."""
            del phase_name, step
            try:
                minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
                report(f"building, {minutes}:{seconds:02d} ({self._phases[-1] if self._phases else ''})")
            except KeyboardInterrupt:
                interrupt.set()
            return not interrupt.is_set()

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""
            self._phases.remove(phase_name)

    return Monitor()
