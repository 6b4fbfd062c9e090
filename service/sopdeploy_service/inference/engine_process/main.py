"""The program of an engine process, started by `server.workers.Supervisor`.

It must not import an HTTP server, an event loop or an image library; `tests` check what it imports.
"""

import json
import logging
import os
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from sopdeploy.errors import SopdeployError
from sopdeploy_service.inference.engine_process.engine import Engine
from sopdeploy_service.inference.engine_process.models import ModelTable

if TYPE_CHECKING:
    from sopdeploy_service.settings import Settings

ORDER_VARIABLE = "SOPDEPLOY_WORKER"
USER_ERROR = 2
PATHS = ("engine_cache", "fast_decode_samples", "verify_key")
LOG = "log: "  # prefix of a line on stdout that the supervisor logs


class LogToSupervisor(logging.Handler):
    """Writes records as lines of JSON to stdout, which the supervisor logs in its own format."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record* with its traceback as one line of JSON to stdout."""
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
        text = record.getMessage() + (f"\n{trace}" if trace else "")
        sys.stdout.write(LOG + json.dumps([record.name, record.levelno, text]) + "\n")
        sys.stdout.flush()


def main() -> int:
    """Serve the models in the order of the supervisor until it closes the broker; return the exit code."""
    order: dict[str, Any] = json.loads(os.environ.pop(ORDER_VARIABLE))
    values = order["settings"]
    given = {**values, **{name: Path(values[name]) for name in PATHS if values[name] is not None}}
    settings = cast("Settings", SimpleNamespace(**given))  # the module of `Settings` imports asyncio
    logging.getLogger().addHandler(LogToSupervisor())
    logging.getLogger("sopdeploy").setLevel(settings.log_level.upper())
    try:
        table = ModelTable(order["sources"], settings)
    except SopdeployError as problem:
        device = f"device {order['name']}: " if order["name"] else ""
        sys.stderr.write(f"error: {device}{problem} [{problem.code}]\n")
        return USER_ERROR
    engine = Engine(table, socket.socket(fileno=order["broker"]), smallest=settings.max_images)
    names = " ".join(models[0].loaded.bundle.name for models in table.models().values())
    sys.stdout.write(f"ready: -  {names}\n")
    sys.stdout.flush()
    return engine.run()


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # without waiting for a thread that hangs in a runtime
