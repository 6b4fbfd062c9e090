"""`sopdeploy serve`: run one server process from verified startup to graceful shutdown.

As a program, this module is the process of a `BackgroundServer`.
"""

import asyncio
import functools
import gc
import logging
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from PIL import Image
from prometheus_client import generate_latest

from sopdeploy.errors import ConfigError
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.memory_budget import BudgetedRegistry
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability import logs
from sopdeploy_service.observability.request_context import OpenTrace, open_tracing
from sopdeploy_service.server.health_port import LoopWatch, health_app, run_in_thread
from sopdeploy_service.server.http_protocol import Connections, LimitedHttpProtocol
from sopdeploy_service.server.launch import RUNTIME_DEAD, run_program
from sopdeploy_service.server.memory import IdleTrigger, limit_heaps
from sopdeploy_service.server.sockets import accept_pending, allow_files, bind, url
from sopdeploy_service.settings import Settings

CLOSING_SECONDS = 2  # for sending the last responses after the drain
LAST_SECONDS = 1.0  # for connections that are open without a request when the port closes
POLL_SECONDS = 0.02
YOUNG_OBJECTS = 10_000  # threshold of the youngest garbage collector generation; Python's default is 700

log = logging.getLogger("sopdeploy.server")


PARTS = (  # optional modules with a function `serve`, which returns None if the settings need one process
    "sopdeploy_service.front_ends.supervisor",
)


def serve(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* until SIGTERM or SIGINT.

    A source is a bundle, a directory of bundles, or `NAME=BUNDLE`. Prints one line, `ready: URL  BUNDLE ...`,
    when the probes are verified and the port is open. Returns the exit code: 0 after a drain, 70 if a runtime
    died. Raises `ConfigError` if it cannot listen, for invalid keys, and if tracing is not installed, and the
    errors of `BundleStore` and `load_model`.
    """
    for part in PARTS:
        code: int | None = import_module(part).serve(sources, settings)
        if code is not None:
            return code
    with bind(settings.host, settings.port) as listener:
        return serve_on(sources, settings, listener)


def serve_on(sources: Sequence[str | Path], settings: Settings, listener: socket.socket) -> int:
    """Serve the bundles at *sources* in this process on *listener*; see `serve`."""
    with configured_process(settings) as open_trace, ExitStack() as stack:
        health = None
        if settings.health_port is not None:
            health = stack.enter_context(bind(settings.host, settings.health_port))
        app, names = load_app(sources, settings, open_trace=open_trace)
        server = DrainingServer(app, settings, names)
        if health is not None:
            sys.stdout.write(f"health: {url(health)}\n")
            service: Service = app.state.service

            async def render() -> bytes:
                return generate_latest(service.metrics.registry)

            probes = health_app(lambda: service.state, render, server.watch, settings.max_loop_lag_seconds)
            stack.enter_context(run_in_thread(probes, health))
        if settings.sandbox == "auto":
            log.debug("not sandboxed: a single process also runs the models, which needs files and threads")
        return server.serve_until_end(listener)


@contextmanager
def configured_process(settings: Settings) -> Iterator[OpenTrace | None]:
    """Configure memory, log and tracing of a server process; yield how to open a trace."""
    prepare_process()
    allow_files(settings.max_connections)
    with logs.configured(settings), open_tracing(settings) as open_trace:
        yield open_trace


def load_app(sources: Sequence[str | Path], settings: Settings, **options: Any) -> tuple[FastAPI, list[str]]:
    """Load the bundles at *sources*; return the app that serves them, and their names."""
    store = BundleStore(sources)
    if settings.memory_budget is not None:
        options["create_registry"] = functools.partial(BudgetedRegistry, store.bundles)
        app = create_app({}, settings, **options)
        return app, [model.bundle.name for model in app.state.service.registry.models()]
    models = {name: load_model(path, settings) for name, path in store.bundles.items()}
    app = create_app(models, settings, store if settings.model_control else None, **options)
    return app, [model.bundle.name for model in models.values()]


def prepare_process() -> None:
    """Configure memory, garbage collection and Pillow's warnings; call it after the imports."""
    limit_heaps()
    # A collection stops all threads; scanning imported objects takes 45 ms, and a request leaves no garbage.
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` rejects such images
    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata, which is not used


def http_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Create the uvicorn configuration of *app* with the connection limits of *settings*."""
    shared = Connections(settings, app.state.service.metrics)
    protocol = functools.partial(LimitedHttpProtocol, shared)
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], protocol),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # client addresses are not used
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )


class DrainingServer(uvicorn.Server):
    """A uvicorn server that responds while it drains, and exits when a runtime is dead.

    The first signal makes the server not ready: new requests get 503, admitted ones are completed within
    `drain_seconds`, then the port is closed. Connections that are open by then may send one more request,
    which gets 503. A second signal ends the drain: unfinished requests get 503.
    """

    def __init__(self, app: FastAPI, settings: Settings, bundles: Sequence[str]) -> None:
        super().__init__(http_config(app, settings))
        self.bundles = " ".join(bundles)
        self._service: Service = app.state.service
        self._output_error: OSError | None = None  # ends the server: nobody learns that it is ready
        self._drain_until: float | None = None
        self._is_draining = False
        self._idle = IdleTrigger()
        self.watch = LoopWatch()
        self._service.metrics.loop_lag.set_function(self.watch.worst)

    def serve_until_end(self, *listeners: socket.socket) -> int:
        """Serve on *listeners* until a signal or the death of a runtime; return the exit code.

        Raises the error of the `ready` line if it cannot be printed.
        """
        self.run(sockets=list(listeners))
        if self._output_error is not None:
            raise self._output_error
        state = self._service.state
        log.info("stopped", extra={"state": state})
        return RUNTIME_DEAD if state == "engine_dead" else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port and print the `ready` line."""
        try:
            await super().startup(sockets)
        except OSError as problem:
            raise ConfigError(f"cannot listen ({problem.strerror}); choose another port") from problem
        self.on_open(sockets or [])
        log.info("started", extra={"bundles": self.bundles})

    def on_open(self, sockets: Sequence[socket.socket]) -> None:
        """Print that the server is ready on *sockets*."""
        try:
            sys.stdout.write(f"ready: {url(sockets[0])}  {self.bundles}\n")
            sys.stdout.flush()
        except OSError as problem:
            self._output_error = problem

    async def serve_connections(self, connections: Sequence[socket.socket]) -> None:
        """Serve accepted *connections*."""
        create_protocol = functools.partial(
            cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        for connection in connections:
            await asyncio.get_running_loop().connect_accepted_socket(create_protocol, connection)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Start to drain, or end the drain; uvicorn would exit with the code of the signal."""
        again = self._drain_until is not None
        self._drain_until = time.monotonic() + (0.0 if again else self._service.settings.drain_seconds)
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Decide ten times per second whether to close the port."""
        self.watch.beat()
        self._idle.tick(time.monotonic(), self._service.active_requests)
        if self._service.state == "engine_dead" or self._output_error is not None:
            return True
        if self._drain_until is not None:
            if not self._is_draining:
                self._is_draining = True  # logged here: a signal handler may interrupt another log line
                seconds = self._service.settings.drain_seconds
                log.info("draining", extra={"requests": self._service.active_requests, "seconds": seconds})
            expired = time.monotonic() >= self._drain_until
            if expired:
                self._service.drain(abort=True)
            if expired or self._service.active_requests == 0:
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port and respond to the connections that were pending, unless a runtime has died."""
        if self._is_draining:
            pending = [connection for listener in sockets or [] for connection in accept_pending(listener)]
            for server in self.servers:
                server.close()
            await self.serve_connections(pending)
            end = time.monotonic() + LAST_SECONDS
            busy = True
            while busy and time.monotonic() < end:
                await asyncio.sleep(POLL_SECONDS)  # the loop reads what has arrived
                protocols = cast(set[LimitedHttpProtocol], self.server_state.connections)
                busy = any(protocol.timeout_keep_alive_task is None for protocol in protocols)
        await super().shutdown(sockets)


def serve_inherited(launch_config: Mapping[str, Any]) -> int:
    """Serve in a process that `server.launch.start_process` has started."""
    listener = socket.socket(fileno=launch_config["listener"])
    return serve_on(launch_config["sources"], Settings(**launch_config["settings"]), listener)


if __name__ == "__main__":
    sys.exit(run_program(serve_inherited))
