"""The template of the processes of a server: it has imported what they need, which takes seconds.

It handles no request, loads no runtime and starts no thread, so a fork is safe, also for CUDA.
Each process becomes a child of the supervisor, whatever happens to the template, which is
started when it is needed.
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

from sopdeploy.bundle.sealed import create_memory, read_memory
from sopdeploy_service import templates
from sopdeploy_service.devices.processes import Child, LaunchConfig
from sopdeploy_service.server.lifetime import STDERR

MODULE = "sopdeploy_service.devices.device_server"
SET_NAME = 15  # PR_SET_NAME
SET_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
LAUNCH = b"launch"  # a message, with files: the launch config, and those of the process
FILES = ("control", "shared", "keys", "limits")  # those of `LaunchConfig`
LIBC = ctypes.CDLL(None)


class ServerTemplate(templates.TemplateProcess):
    """Forks the processes of a server, which are children of this process and do not end with it."""

    async def start(self, config: LaunchConfig, *files: int) -> Child:
        """Start a process with *config* and *files*, which are the first ones of `FILES`.

        Raises `OSError` if the system has no room for it.
        """
        config_file = create_memory("sopdeploy-launch", [config.model_dump_json().encode()])
        try:
            process, code = await asyncio.to_thread(self.ask, LAUNCH, config_file, *files)
        finally:
            os.close(config_file)

        if process == 0:
            raise OSError(code, os.strerror(code))
        return Child(process)

    def run(self, file: int) -> subprocess.Popen[bytes]:
        """Run the program, which gets the environment of this process."""
        LIBC.prctl(SET_SUBREAPER, 1)  # orphans become children of this process
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, str(file)],
            stdout=STDERR,  # stdout has the `ready` line only
            start_new_session=True,  # Ctrl-C reaches the supervisor only, which forwards it
            pass_fds=[file],
            # No threads: a fork would lose them.
            env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
        )


def wait_for_launch() -> LaunchConfig:
    """Fork a process for each message of the supervisor; return in each of them, with its config.

    The socket to the supervisor is the argument of the command line. The template ends with the
    supervisor, even if it is stopped by a signal then.
    """
    templates.end_with_parent(os.getppid())
    LIBC.prctl(SET_NAME, b"template")
    # The garbage collector of a process would write to the pages, and thereby copy them.
    gc.freeze()
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        # Wait for a message; without one, the supervisor has ended.
        message, files, _, _ = socket.recv_fds(requests, len(LAUNCH), 1 + len(FILES))
        if not message:
            raise SystemExit(0)

        if _fork_orphan(requests):
            config_file, *own_files = files
            config = LaunchConfig.model_validate_json(read_memory(config_file))
            LIBC.prctl(SET_NAME, config.name.encode())  # as `ps -o comm` and `top` show it
            os.environ.update(config.variables)

            return config.model_copy(update=dict(zip(FILES, own_files, strict=False)))

        for file in files:
            os.close(file)


def _fork_orphan(requests: socket.socket) -> bool:
    """Fork a process whose parent has ended, so that it is a child of the supervisor.

    Returns whether this is the new process. *requests* gets the reply.
    """
    # Fork twice; the process between ends at once, so that its child is an orphan.
    supervisor = os.getppid()
    between = 0
    try:
        if between := os.fork():
            os.waitpid(between, 0)
            return False

        between = os.getpid()
        if os.fork():
            os._exit(0)
    except OSError as error:
        requests.send(templates.REPLY.pack(0, error.errno or errno.EAGAIN))
        if os.getpid() == between:  # the second fork has failed
            os._exit(1)
        return False

    while os.getppid() == between:
        time.sleep(0.001)

    # The supervisor has ended, or the system gives orphans to another process.
    if os.getppid() != supervisor:
        requests.send(templates.REPLY.pack(0, errno.ENOSYS))
        os._exit(1)

    requests.send(templates.REPLY.pack(os.getpid(), 0))
    requests.close()
    return True
