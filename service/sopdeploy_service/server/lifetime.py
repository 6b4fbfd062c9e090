"""What a server process and the supervisor of several share: ticks, tasks and the end of a terminal."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sopdeploy.errors import ConfigError

STDERR = 2
USER_ERROR = 2
HAS_TERMINAL = os.isatty(STDERR)  # at the start
BEAT_SECONDS = 0.1  # interval of uvicorn's ticks
FOLLOW_SECONDS = 1.0


def terminal_is_closed() -> bool:
    """Tell whether the terminal of this process is gone: its SIGHUP ends a server, another one reloads it."""
    return HAS_TERMINAL and not os.isatty(STDERR)


def start_task(
    tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]
) -> asyncio.Task[None]:
    """Start *work* on the running event loop; *tasks* keeps it until it ends, as the loop alone does not."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


async def follow(
    read: Callable[[], object], before: object, reload: Callable[[], object]
) -> None:
    """Call *reload* whenever *read*, which is called each second, returns something else than *before*."""
    while True:
        await asyncio.sleep(FOLLOW_SECONDS)

        try:
            now = await asyncio.to_thread(read)
        except (OSError, ConfigError):  # the folder, or its log, cannot be read now
            continue

        if now != before:
            before = now
            reload()


class Joined:
    """Does *work* when it is requested; requests that come during it are one more time. For one event loop."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._is_requested = self._is_running = False
        self._tasks: set[asyncio.Task[None]] = set()

    def request(self) -> None:
        """Do the work once after this call."""
        self._is_requested = True
        if not self._is_running:
            self._is_running = True
            start_task(self._tasks, self._run())

    async def _run(self) -> None:
        try:
            while self._is_requested:
                self._is_requested = False
                await self._work()
        finally:
            self._is_running = False
