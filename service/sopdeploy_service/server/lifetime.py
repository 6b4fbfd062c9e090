"""What a server process and the supervisor of several share: ticks, tasks and the end of a terminal."""

import asyncio
import errno
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from sopdeploy.errors import ConfigError, RuntimeUnavailableError, first_line
from sopdeploy_service.http.api_keys import file_identity
from sopdeploy_service.settings import Settings
from sopdeploy_service.tasks import start_task

STDERR = 2
# Of a system without room for a process, thread, file or memory.
NO_ROOM = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
USER_ERROR = 2
EXIT_RUNTIME_DEAD = 70  # EX_SOFTWARE: whoever started the server should start it again
TERMINAL = "/dev/tty"  # of the session, whatever the standard streams are
BEAT_SECONDS = 0.1  # interval of uvicorn's ticks
FOLLOW_SECONDS = 1.0
# Pauses before work that has failed is tried again: the first one, and the longest, after it has doubled each time
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0


def has_terminal() -> bool:
    """Tell whether the session of this process has a terminal."""
    try:
        os.close(os.open(TERMINAL, os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


# At the start; `nohup` ignores SIGHUP, so that the end of the terminal is none of the server.
ENDS_WITH_TERMINAL = has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN


def terminal_is_closed() -> bool:
    """Tell whether the terminal of this process is gone: its SIGHUP ends a server, another one reloads it."""
    return ENDS_WITH_TERMINAL and not has_terminal()


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


def follow_keys(
    tasks: set[asyncio.Task[None]], settings: Settings, reload: Callable[[], object]
) -> None:
    """Start one of *tasks* that calls *reload* when the key file changes, if *settings* say to follow it."""
    if settings.follow and settings.keys is not None:
        # The first look also reloads: the file may have changed since it was read.
        start_task(tasks, follow(partial(file_identity, settings.keys), None, reload))


class Joined:
    """Does *work*, which returns whether it has succeeded, when it is requested. For one event loop.

    Requests that come while it is done make it be done once more, however many they are. If it
    *tries_again*, work that has failed is done again after growing pauses, until it succeeds.
    """

    def __init__(self, work: Callable[[], Awaitable[bool]], *, tries_again: bool) -> None:
        self._work = work
        self._tries_again = tries_again
        self._is_requested = self._is_running = False
        self._pause = FIRST_PAUSE_SECONDS
        self._next: asyncio.TimerHandle | None = None  # after a pause
        self._tasks: set[asyncio.Task[None]] = set()

    def request(self) -> None:
        """Do the work once after this call."""
        self._pause = FIRST_PAUSE_SECONDS
        self._begin()

    def _begin(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None

        self._is_requested = True
        if not self._is_running:
            self._is_running = True
            start_task(self._tasks, self._run())

    async def _run(self) -> None:
        succeeded = False
        try:
            while self._is_requested:
                self._is_requested = False
                succeeded = await self._work()
        finally:
            self._is_running = False

        if self._tries_again and not succeeded:
            self._next = asyncio.get_running_loop().call_later(self._pause, self._begin)
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


@contextmanager
def room_required() -> Iterator[None]:
    """Raise `RuntimeUnavailableError` where the system has no room for a thread, process, file or memory."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not lacks_room(error):
            raise
        raise RuntimeUnavailableError(
            f"the system has no room for the server ({first_line(error)}); allow more processes and files, or "
            "serve with fewer front ends and decoders"
        ) from error


def lacks_room(error: BaseException) -> bool:
    """Tell whether *error* says that the system gives no further thread, process, file or memory."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return isinstance(error, MemoryError) or "can't start new thread" in str(error)
