"""One process of `serve --devices`: serves on the sockets it was born with, while its parent lives."""

import json
import os
import signal
import socket
import sys
import threading
from typing import Any

from sopdeploy.errors import SopdeployError
from sopdeploy_service.server.process import Inherited, serve_on
from sopdeploy_service.settings import WORKER_VARIABLE, Settings

USER_ERROR = 2


def main() -> int:
    """Serve as the environment orders; return the exit code."""
    order: dict[str, Any] = json.loads(os.environ.pop(WORKER_VARIABLE))
    follow(order["lifeline"])
    place = Inherited(
        sockets=(socket.socket(fileno=order["listener"]), socket.socket(fileno=order["private"])),
        siblings=order["siblings"],
    )
    try:
        return serve_on(order["sources"], Settings(**{**order["settings"], "devices": ()}), place)
    except SopdeployError as problem:
        sys.stderr.write(f"error: device {order['name']}: {problem}\n")
        return USER_ERROR


def follow(lifeline: int) -> None:
    """Drain as soon as the parent is gone: then the pipe *lifeline* has no writer any more."""

    def wait() -> None:
        os.read(lifeline, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
