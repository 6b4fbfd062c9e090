"""Report the progress of a TensorRT build."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Report = Callable[[str], None]


def progress_line(elapsed: float, last_build: float | None, phase: str = "") -> str:
    """Format elapsed seconds, the remaining seconds according to the *last_build*, and the *phase*."""

    def minutes(seconds: float) -> str:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    text = f"building, {minutes(elapsed)}"
    if last_build is not None:
        text += f", about {minutes(max(0.0, last_build - elapsed))} left"
    return f"{text} ({phase})" if phase else text


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed during a build."""

    received: bool = False


@contextmanager
def interrupts_recorded() -> Iterator[Interrupt]:
    """Record Ctrl-C instead of raising `KeyboardInterrupt`, which is then raised at the end.

    An exception must not reach the C++ code of TensorRT, which prints it and continues or fails: a signal
    that arrives there would be raised in the next callback, before its first line.
    """
    interrupt = Interrupt()

    def record(*_: Any) -> None:
        interrupt.received = True

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    replaced = usual and threading.current_thread() is threading.main_thread()
    if replaced:
        signal.signal(signal.SIGINT, record)
    try:
        yield interrupt
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupt.received:
            raise KeyboardInterrupt


def make_monitor(trt: Any, report: Report, last_build: float | None, interrupt: Interrupt) -> Any:
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
                elapsed = time.monotonic() - self._begin
                report(progress_line(elapsed, last_build, self._phases[-1] if self._phases else ""))
            except KeyboardInterrupt:
                interrupt.received = True
            return not interrupt.received

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""
            self._phases.remove(phase_name)

    return Monitor()
