"""The named clocks of one connection: a name runs at most once at a time."""

import asyncio
from collections.abc import Callable


class Timers:
    """Clocks on *loop*; used on it only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running: dict[str, asyncio.TimerHandle] = {}

    def start(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        """Call *then* after *seconds*, unless the clock *name* runs already."""
        if name not in self._running:
            self._running[name] = self._loop.call_later(seconds, self._ring, name, then)

    def stop(self, name: str) -> bool:
        """Stop the clock *name*; return whether it ran."""
        timer = self._running.pop(name, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def stop_all(self) -> None:
        """Stop every clock."""
        for name in list(self._running):
            self.stop(name)

    def _ring(self, name: str, then: Callable[[], None]) -> None:
        del self._running[name]
        then()
