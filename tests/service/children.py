"""Server processes that a test starts: nothing waits for them without a limit."""

import socket
import subprocess
import threading

START_SECONDS = 90.0  # far more than a start takes on a machine that is busy with other things


def line_of(child: subprocess.Popen[str], seconds: float = START_SECONDS) -> str:
    """The next line of what *child* prints; it is killed, and the line empty, where none comes in time."""
    assert child.stdout is not None
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
        return child.stdout.readline()
    finally:
        timer.cancel()


def free_port() -> int:
    """A port of this machine on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
