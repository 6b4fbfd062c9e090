"""Templates: processes that have imported what others need, and fork these for another process.

A fork shares the imported libraries and takes milliseconds. `decoding.pool` and
`devices.template` say how their templates are started, and whose children the others are.
"""

import ctypes
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from abc import ABC, abstractmethod

# The id of the process that a template has forked or ended; of an ended one, its exit code, -N
# after signal N. The id 0 and an error number if the system forks no other process.
REPLY = struct.Struct("<Ii")
START_SECONDS = 60.0  # for the imports; a template that takes longer is replaced
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process, also if it is stopped, when *parent* has ended, however (Linux).

    It also does so when the thread of *parent* that started this process has ended.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os.kill(os.getpid(), signal.SIGKILL)


class TemplateProcess(ABC):
    """A template, for the process for which it forks; it is started when it is needed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def run(self, file: int) -> subprocess.Popen[bytes]:
        """Run the program of the template, which reads messages from the socket *file*."""

    def ask(self, message: bytes, *files: int) -> tuple[int, int]:
        """Send *message* and *files* to the template; return its reply: (process ID, exit code or error).

        An `OSError`, which the caller gets, ends the template; the next call starts another one.
        It is a `BrokenPipeError` if the template itself has ended. `REPLY` describes the reply.
        """
        with self._lock:
            # Replace a template that has ended.
            if self._process is not None and self._process.poll() is not None:
                self._close()

            # Pass the message on, and wait for the reply.
            try:
                end = self._socket or self._start()
                socket.send_fds(end, [message], files)
                reply = end.recv(REPLY.size, socket.MSG_WAITALL)
                if len(reply) != REPLY.size:
                    raise ConnectionResetError
            except ConnectionError as error:
                self._close()
                raise BrokenPipeError(errno.EPIPE, "its template has ended") from error
            except OSError:
                self._close()
                raise

        process, code = REPLY.unpack(reply)
        return process, code

    def abort(self) -> None:
        """Kill the process of the template; whoever waits for its reply gets an error."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the template."""
        self.abort()
        with self._lock:
            self._close()

    def _start(self) -> socket.socket:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(START_SECONDS)
        with theirs:
            self._process = self.run(theirs.fileno())
        return self._socket

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()

        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None
