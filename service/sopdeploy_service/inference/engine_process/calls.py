"""Calls from other threads into the epoll loop of the engine process."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable


class Calls:
    """Functions that other threads add and the thread of the loop runs.

    `descriptor` is an eventfd: the loop polls it, because it becomes readable when a function is added. It is
    -1 after `close`.
    """

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._added: deque[Callable[[], None]] = deque()

    def add(self, function: Callable[[], None]) -> None:
        """Let the loop run *function*; raises `RuntimeError` after `close`. Any thread may call it."""
        # Without the lock, the loop could run the function and close the descriptor before the write.
        with self._lock:
            if self.descriptor < 0:
                raise RuntimeError("the loop of the engine has ended")
            self._added.append(function)
            os.eventfd_write(self.descriptor, 1)

    def reset(self) -> None:
        """Make the descriptor unreadable until the next `add`; call it before `run`."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def run(self) -> None:
        """Run the functions in the order in which they were added."""
        while self._added:
            self._added.popleft()()  # no variable: it would keep the memory of a dead front end mapped

    def close(self) -> None:
        """Close the descriptor; functions that have not been run are dropped."""
        with self._lock:
            os.close(self.descriptor)
            self.descriptor = -1
