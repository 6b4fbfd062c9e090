"""`sopdeploy serve`: one process, from a verified start to a drained end."""

import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from PIL import Image

from sopdeploy.errors import ConfigError
from sopdeploy_service.app import create_app
from sopdeploy_service.service import Service
from sopdeploy_service.settings import Settings
from sopdeploy_service.shelf import Shelf
from sopdeploy_service.verified import open_verified

ENGINE_DEAD_EXIT = 70  # EX_SOFTWARE; a supervisor should start the process again
CLOSING_SECONDS = 2  # for the last answers to leave, after everything was answered or refused
KEEP_ALIVE_SECONDS = 65  # longer than the idle time of common load balancers


def serve(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* until SIGTERM or SIGINT; return the exit code.

    A source is a bundle, a folder of bundles, or `NAME=BUNDLE`. 0 after a drain, 70 where an engine died.
    Prints one line, `ready: URL  BUNDLE ...`, when the probes gave the right numbers and the port is open.
    Raises `ConfigError` where it cannot listen, and what `Shelf` and `open_verified` raise for the bundles.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels refuses such pictures
    with bind(settings.host, settings.port) as listener:
        shelf = Shelf(sources)
        inferences = {name: open_verified(path, settings) for name, path in shelf.bundles.items()}
        app = create_app(inferences, settings, shelf if settings.model_control else None)
        config = uvicorn.Config(
            app,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        names = " ".join(inference.bundle.name for inference in inferences.values())
        ready = f"ready: {url(listener)}  {names}"
        server = DrainingServer(config, app.state.service, settings.drain_seconds, ready)
        server.run(sockets=[listener])
    return ENGINE_DEAD_EXIT if app.state.service.state == "engine_dead" else 0


class DrainingServer(uvicorn.Server):
    """A uvicorn that goes on answering while it drains, and ends when the engine is dead.

    The first signal makes the server not ready: new requests get 503, those already here are
    answered for at most *drain_seconds*, then the port is closed. A second signal ends the drain:
    what is not answered by then gets 503.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float, ready: str) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds
        self._ready = ready
        self._drain_until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port and say so."""
        try:
            await super().startup(sockets)
        except OSError as problem:
            raise ConfigError(f"cannot listen ({problem.strerror}); choose another port") from problem
        sys.stdout.write(self._ready + "\n")
        sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to drain, or end the drain; uvicorn's own would end with the signal's exit code."""
        again = self._drain_until is not None
        self._drain_until = time.monotonic() + (0.0 if again else self._drain_seconds)
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to close the port now; uvicorn asks ten times a second."""
        if self._service.state == "engine_dead":
            return True
        if self._drain_until is not None:
            late = time.monotonic() >= self._drain_until
            if late:
                self._service.abandon()
            if late or self._service.requests == 0:
                return True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to *host* and *port* that does not listen yet; port 0 is any free one.

    Raises `ConfigError` where the address does not exist here or is in use.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as problem:
        raise ConfigError(
            f"{host}:{port}: cannot listen ({problem.strerror}); choose another host or port"
        ) from problem
    return listener


def url(listener: socket.socket) -> str:
    """Return the URL of a bound *listener*."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
