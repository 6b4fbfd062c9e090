"""Helpers for server processes of tests; every wait has a timeout."""

import socket
import subprocess
import threading

START_SECONDS = 90.0  # far more than a start takes on a busy machine


def line_of(child: subprocess.Popen[str], seconds: float = START_SECONDS) -> str:
    """Read the next line of *child*; after *seconds* it is killed and the line is empty."""
    assert child.stdout is not None
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
        return child.stdout.readline()
    finally:
        timer.cancel()


def free_port() -> int:
    """Find a port on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
