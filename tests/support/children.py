"""Helpers for server processes of tests; every wait has a timeout."""

import contextlib
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

from tests.support.slow import mostly_slow

START_SECONDS = 90.0  # far more than a start takes on a busy machine
SERVE = ("-m", "sopdeploy", "serve")

# How a server runs -> flags. Tests with this table demand the same behavior of all.
ONE_PROCESS = "one process"
TWO_DEVICES = "two devices"
FRONT_ENDS = "front ends"
WAYS: dict[str, tuple[str, ...]] = {
    ONE_PROCESS: (),
    TWO_DEVICES: ("--devices", "cpu,cpu"),
    FRONT_ENDS: ("--set", "front_ends=2"),
}
# The cases of a test with this table.
EACH_WAY = mostly_slow(WAYS, ONE_PROCESS)


def spawn(
    *arguments: str,
    program: tuple[str, ...] = SERVE,
    stderr: int | IO[str] = subprocess.PIPE,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start a server, or another *program* with its arguments, on any free port.

    *options* are further ones of `subprocess.Popen`.
    """
    command = [sys.executable, *program, "--port", "0", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, **options
    )


class ServerClient(httpx.Client):
    """A client of a server in another process, with a new connection for each request.

    Requests therefore reach all processes of a server that serve HTTP.
    """

    child: subprocess.Popen[str]


@contextmanager
def serving(*arguments: str, **options: Any) -> Iterator[ServerClient]:
    """Start a server, as `spawn` does, and wait until it is ready; kill it at the end."""
    with spawn(*arguments, "--set", "threads=1", **options) as child:
        try:
            ready = re.match(r"ready: (\S+)  ", line_of(child))
            assert ready, child.communicate(timeout=20)
            limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
            with ServerClient(base_url=ready[1], timeout=60, limits=limits) as client:
                client.child = child
                yield client
        finally:
            child.kill()


def kills_itself(run: Callable[[], object]) -> bool:
    """Do *run* in a fork of this process; return whether it was killed. Any other error fails."""
    process = os.fork()
    if not process:
        status = 1
        try:
            run()
            status = 0
        except BaseException:  # it must not go on as a second pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(process, 0)
    assert ended in {0, signal.SIGKILL}, os.waitstatus_to_exitcode(ended)
    return ended != 0


def line_of(child: subprocess.Popen[str]) -> str:
    """Read the next line of *child*; after `START_SECONDS` it is killed and the line is empty."""
    assert child.stdout is not None
    timer = threading.Timer(START_SECONDS, child.kill)
    timer.start()
    try:
        return child.stdout.readline()
    finally:
        timer.cancel()


def children_of(parent: int) -> list[int]:
    """List the child processes of the process *parent*."""
    files = Path(f"/proc/{parent}/task").glob("*/children")  # each thread has its own
    return sorted({int(part) for file in files for part in file.read_text().split()})


def processes_of(supervisor: int) -> dict[int, str]:
    """Return the names of the processes of devices and front ends by id, in order.

    The decoders of one that was killed, which are children of *supervisor* until they end, too,
    have the name of the interpreter.
    """
    found = {}
    for child in children_of(supervisor):
        with contextlib.suppress(OSError):  # it has ended
            found[child] = Path(f"/proc/{child}/comm").read_text().strip()
    others = ("template", "python")
    return {child: name for child, name in found.items() if not name.startswith(others)}


def are_replaced(supervisor: int, before: dict[int, str]) -> bool:
    """Whether each of the processes *before* has ended, and another of its name runs."""
    now = processes_of(supervisor)
    return not before.keys() & now.keys() and set(before.values()) <= set(now.values())


def is_alive(process: int) -> bool:
    """Whether *process* runs."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def num_open_files() -> int:
    """Count the open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def free_port() -> int:
    """Find a port on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def below(process: int) -> dict[int, str]:
    """List the command lines of the running descendants of *process* by process ID (Linux)."""
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):  # it has ended
        for child in children_of(process):
            found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            found |= below(child)
    return found


def listening(process: int) -> list[ipaddress.IPv4Address]:
    """Return the addresses on which *process* listens for TCP (Linux); `::` counts as 0.0.0.0."""
    # The sockets of the process, such as `socket:[1234]`
    sockets = set()
    for file in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(file.readlink()))

    # The rows of all sockets: number, local address and port, remote ones, state, ..., inode.
    addresses = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines():
            _, local, _, state, *others = line.split()
            if state == "0A" and f"socket:[{others[5]}]" in sockets:  # it listens
                digits = local.partition(":")[0][-8:]  # the last four bytes, in reverse
                addresses.append(ipaddress.IPv4Address(bytes.fromhex(digits)[::-1]))

    return addresses
