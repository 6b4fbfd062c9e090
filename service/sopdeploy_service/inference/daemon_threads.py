"""Threads for work that may never end, such as a load on a device that hangs; they do not delay an exit.

Python waits at its exit for the threads of `ThreadPoolExecutor`, also for those of
`asyncio.to_thread`.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from sopdeploy.base.environment import DAEMON_THREAD

_Result = TypeVar("_Result")


def start(
    work: Callable[[], _Result], discard: Callable[[_Result], object] = lambda _: None
) -> Future[_Result]:
    """Run *work* in a daemon thread; a result that comes after the future was cancelled goes to *discard*."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # who waits for the future gets it
            with suppress(InvalidStateError):
                future.set_exception(error)
            return

        try:
            future.set_result(result)
        except InvalidStateError:
            discard(result)

    threading.Thread(target=run, name=DAEMON_THREAD, daemon=True).start()
    return future


class DaemonThreads(ThreadPoolExecutor):
    """Executor of an event loop with a thread for each call; neither shutdown nor exit waits for them."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start *work* at once."""
        return start(partial(work, *args, **kwargs))


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a daemon thread during the block."""
    loop = asyncio.new_event_loop()

    thread = threading.Thread(target=loop.run_forever, name=DAEMON_THREAD, daemon=True)
    thread.start()

    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
