"""Worker process of `serve --devices`: serves on inherited sockets until its parent exits."""

import json
import os
import signal
import socket
import sys
import threading
from typing import Any

from sopdeploy.errors import SopdeployError
from sopdeploy_service.server.process import Inherited, serve_on
from sopdeploy_service.server.workers import USER_ERROR
from sopdeploy_service.settings import WORKER_VARIABLE, Settings


def main() -> int:
    """Serve as described by the environment variable `WORKER_VARIABLE`; the result is the exit code."""
    order: dict[str, Any] = json.loads(os.environ.pop(WORKER_VARIABLE))

    def stop_with_parent() -> None:
        os.read(order["lifeline"], 1)  # returns when the parent closes the pipe, or dies
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_parent, name="lifeline", daemon=True).start()
    inherited = Inherited(
        sockets=(socket.socket(fileno=order["listener"]), socket.socket(fileno=order["private"])),
        siblings=order["siblings"],
    )
    try:
        return serve_on(order["sources"], Settings(**{**order["settings"], "devices": ()}), inherited)
    except SopdeployError as problem:
        sys.stderr.write(f"error: device {order['name']}: {problem}\n")
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
