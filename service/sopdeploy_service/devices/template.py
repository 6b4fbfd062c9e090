"""The template of the processes of a server: it has imported what they need, which takes seconds.

It handles no request, loads no runtime and starts no thread, so a fork is safe, also for CUDA. Each process
becomes a child of the supervisor, whatever happens to the template, which is started when it is needed.
"""

import asyncio
import ctypes
import errno
import gc
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

from sopdeploy.bundle.sealed import create_memory, read_memory
from sopdeploy_service.devices import control
from sopdeploy_service.devices.processes import ENDED, STOPPED, Child, LaunchConfig, run_states
from sopdeploy_service.server.lifetime import STDERR

MODULE = "sopdeploy_service.devices.device_server"
START_SECONDS = 30.0  # for the imports; a template that takes longer is replaced
SET_NAME, SET_SUBREAPER = 15, 36  # PR_SET_NAME, PR_SET_CHILD_SUBREAPER
LAUNCH, NUM_FILES = b"launch", 4  # the launch config and the files of a process

LIBC = ctypes.CDLL(None)


class Template:
    """The supervisor's side; `start` starts a process."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = asyncio.Lock()

    async def start(self, config: LaunchConfig, *files: int) -> Child:
        """Start a process with *config* and *files*: its control socket, shared memory and keys.

        Raises `OSError` if the system has no room for it.
        """
        async with self._asking:
            # It may have ended, or a user or the kernel has stopped it.
            states, _ = (set(), 0) if self._process is None else run_states(self._process.pid)
            if self._socket is not None and not states - {ENDED, STOPPED}:
                self.close()
            end, answer = self._socket or self._open(), b""
            described = create_memory("sopdeploy-launch", [config.model_dump_json().encode()])
            with suppress(OSError):
                if control.send_message(end, LAUNCH, b"", described, *files):
                    async with asyncio.timeout(START_SECONDS):
                        answer = await asyncio.get_running_loop().sock_recv(end, control.MAX_MESSAGE)
            os.close(described)
            if not answer:
                self.close()
        number = int(answer or -errno.EPIPE)
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        return Child(number)

    def _open(self) -> socket.socket:
        """Start the template; return the socket to it."""
        LIBC.prctl(SET_SUBREAPER, 1)  # orphans become children of this process
        ours, theirs = control.socket_pair()
        with theirs, ExitStack() as unless_started:
            unless_started.enter_context(ours)
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno())],
                stdout=STDERR,  # stdout has the `ready` line only
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which forwards it
                pass_fds=[theirs.fileno()],
                env={"OPENBLAS_NUM_THREADS": "1", **os.environ},  # no threads: a fork would lose them
            )
            unless_started.pop_all()
        self._socket = ours
        return ours

    def close(self) -> None:
        """End the template, but none of the processes that it has forked."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None


def wait_for_launch() -> LaunchConfig:
    """Fork a process for each message of the supervisor; return in each of them, with its config.

    The socket to the supervisor is the argument of the command line. Exits when the supervisor ends.
    """
    LIBC.prctl(SET_NAME, b"template")
    gc.freeze()  # the garbage collector of a process would write to the pages, and thereby copy them
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.setblocking(True)
    while (message := control.receive_message(requests, NUM_FILES)).kind:
        if _fork_orphan(requests):
            config = LaunchConfig.model_validate_json(read_memory(message.files[0]))
            own, shared, keys = message.files[1:]
            LIBC.prctl(SET_NAME, config.name.encode())  # as `ps -o comm` and `top` show it
            os.environ.update(config.variables)
            return config.model_copy(update={"control": own, "shared": shared, "keys": keys})
        for file in message.files:
            os.close(file)
    raise SystemExit(0)


def _fork_orphan(requests: socket.socket) -> bool:
    """Fork a process whose parent has ended, so that it is a child of the supervisor.

    Returns whether this is the new process. *requests* gets its id, or a negative error number.
    """
    between = 0
    try:
        if between := os.fork():
            os.waitpid(between, 0)
            return False
        between = os.getpid()
        if os.fork():
            os._exit(0)
    except OSError as error:
        requests.send(b"%d" % -(error.errno or errno.EAGAIN))
        if os.getpid() == between:
            os._exit(1)
        return False
    while os.getppid() == between:
        time.sleep(0.001)
    requests.send(b"%d" % os.getpid())
    requests.close()
    return True
