"""How far a build is: TensorRT 10 and 11 tell it step by step, for 8.6 there is a heartbeat.

A build may take many minutes. The share that is done comes from nested phases, the time that is left from the
share, or from how long the last build of this bundle took.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Tell = Callable[[str], None]
Clock = Callable[[], float]
BEAT_SECONDS = 5.0
LEAST_SHARE = 0.02  # below it the time that is left would be a guess
MINUTE = 60


class Phases:
    """Nested phases and the share of the outermost that is done."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}  # phase: [done, of]
        self._parent: dict[str, str | None] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Note that *phase* of *steps* steps begins, inside of *parent*."""
        self._steps[phase] = [0, max(1, steps)]
        self._parent[phase] = parent

    def step(self, phase: str, done: int) -> None:
        """Note that step number *done* of *phase*, from 0, is complete."""
        if phase in self._steps:
            self._steps[phase][0] = done + 1

    def finish(self, phase: str) -> None:
        """Note that *phase* is over."""
        self._steps.pop(phase, None)
        self._parent.pop(phase, None)

    @property
    def innermost(self) -> str:
        """Return the name of the phase that began last."""
        return next(reversed(self._steps), "")

    @property
    def share(self) -> float:
        """Return how much of the outermost phase is done, 0 to 1."""
        outermost = [phase for phase, parent in self._parent.items() if parent not in self._parent]
        return self._share_of(outermost[0]) if outermost else 0.0

    def _share_of(self, phase: str) -> float:
        done, steps = self._steps[phase]
        inside = [self._share_of(child) for child, parent in self._parent.items() if parent == phase]
        return min(1.0, (done + max(inside, default=0.0)) / steps)


def line(elapsed: float, share: float | None, last_build: float | None, phase: str = "") -> str:
    """Return what the user reads: time so far, share, and an estimate of what is left."""
    text = f"building, {clock_time(elapsed)}"
    left = None
    if share is not None and share >= LEAST_SHARE:
        text += f", {share:.0%}"
        left = elapsed * (1 - share) / share
    elif last_build is not None:
        left = max(0.0, last_build - elapsed)
    if left is not None:
        text += f", about {clock_time(left)} left"
    return f"{text} ({phase})" if phase else text


def clock_time(seconds: float) -> str:
    """Return *seconds* as `2:05`."""
    return f"{int(seconds) // MINUTE}:{int(seconds) % MINUTE:02d}"


def make_monitor(trt: Any, tell: Tell, last_build: float | None, clock: Clock = time.monotonic) -> Any:
    """Return a progress monitor for TensorRT 10 and 11; control-C ends the build at its next step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        """Tells every step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = Phases()
            self._begin = clock()
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Begin a phase."""
            self._phases.start(phase_name, parent_phase or None, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Note a step; return whether the build is to go on."""
            try:
                self._phases.step(phase_name, step)
                share = self._phases.share
                tell(line(clock() - self._begin, share, last_build, self._phases.innermost))
            except KeyboardInterrupt:  # an exception must not cross TensorRT's own code
                self.stopped = True
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""
            self._phases.finish(phase_name)

    return Monitor()


@contextmanager
def heartbeat(tell: Tell, last_build: float | None, seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Tell every few seconds that the build of TensorRT 8.6 goes on."""
    begin = time.monotonic()
    over = threading.Event()

    def beat() -> None:
        while not over.wait(seconds):
            tell(line(time.monotonic() - begin, None, last_build))

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
