"""Report the progress of a TensorRT build."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Report = Callable[[str], None]
MIN_FRACTION = 0.02  # below it, an estimate of the remaining time would be a guess


class Phases:
    """The nested phases of a build, and the completed fraction of the outermost one."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}  # phase: [completed, total]
        self._parent: dict[str, str | None] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Begin *phase* with *steps* steps inside *parent*."""
        self._steps[phase] = [0, max(1, steps)]
        self._parent[phase] = parent

    def step(self, phase: str, index: int) -> None:
        """Complete step *index*, from 0, of *phase*."""
        if phase in self._steps:
            self._steps[phase][0] = index + 1

    def finish(self, phase: str) -> None:
        """End *phase*."""
        self._steps.pop(phase, None)
        self._parent.pop(phase, None)

    @property
    def innermost(self) -> str:
        """The name of the phase that began last, or an empty string."""
        return next(reversed(self._steps), "")

    @property
    def fraction(self) -> float:
        """The completed fraction of the outermost phase, in [0, 1]."""
        outermost = [phase for phase, parent in self._parent.items() if parent not in self._parent]
        return self._fraction_of(outermost[0]) if outermost else 0.0

    def _fraction_of(self, phase: str) -> float:
        done, steps = self._steps[phase]
        inside = [self._fraction_of(child) for child, parent in self._parent.items() if parent == phase]
        return min(1.0, (done + max(inside, default=0.0)) / steps)


def progress_line(elapsed: float, fraction: float, last_build: float | None, phase: str = "") -> str:
    """Format elapsed seconds, completed fraction and an estimate of the remaining time.

    The estimate uses *fraction*, or the seconds of the *last_build*.
    """

    def minutes(seconds: float) -> str:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    text = f"building, {minutes(elapsed)}"
    left = None
    if fraction >= MIN_FRACTION:
        text += f", {fraction:.0%}"
        left = elapsed * (1 - fraction) / fraction
    elif last_build is not None:
        left = max(0.0, last_build - elapsed)
    if left is not None:
        text += f", about {minutes(left)} left"
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
            self._phases = Phases()
            self._begin = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Begin a phase."""
            self._phases.start(phase_name, parent_phase or None, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Complete a step; False stops the build."""
            try:
                self._phases.step(phase_name, step)
                elapsed = time.monotonic() - self._begin
                report(progress_line(elapsed, self._phases.fraction, last_build, self._phases.innermost))
            except KeyboardInterrupt:
                interrupt.received = True
            return not interrupt.received

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""
            self._phases.finish(phase_name)

    return Monitor()
