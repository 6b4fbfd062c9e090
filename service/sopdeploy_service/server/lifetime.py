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
    """Does *work* when it is requested. For one event loop.

    Requests that come while it is done make it be done once more, however many they are.
    """

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
