"""`sopdeploy serve`: one process, from a verified start to a drained end."""

import asyncio
import functools
import logging
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI
from PIL import Image

from sopdeploy.errors import ConfigError
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.fault_injection import faults_from_environment
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability import logs
from sopdeploy_service.observability.logs import Timeline
from sopdeploy_service.observability.request_context import open_tracing
from sopdeploy_service.server.connection_limits import Connections, allow_files
from sopdeploy_service.server.health_port import LoopWatch, answering, health_app
from sopdeploy_service.server.http_protocol import LimitedHttpProtocol
from sopdeploy_service.server.memory import Rest, collect_seldom, give_back_in_a_thread, keep_little
from sopdeploy_service.server.sockets import bind, take_in, url
from sopdeploy_service.server.workers import Supervisor
from sopdeploy_service.settings import Settings

ENGINE_DEAD_EXIT = 70  # EX_SOFTWARE; a supervisor should start the process again
CLOSING_SECONDS = 2  # for the last answers to leave, after everything was answered or refused
LAST_SECONDS = 1.0  # for those connected when the port closes to say what they want
GLANCE_SECONDS = 0.02

log = logging.getLogger("sopdeploy.server")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inherited:
    """What a worker of several devices is born with: its sockets, and where each device's numbers are."""

    sockets: tuple[socket.socket, ...]
    siblings: dict[str, str]


def serve(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* until SIGTERM or SIGINT; return the exit code.

    A source is a bundle, a folder of bundles, or `NAME=BUNDLE`. 0 after a drain, 70 where an engine died.
    Prints one line, `ready: URL  BUNDLE ...`, when the probes gave the right numbers and the port is open.
    Raises `ConfigError` where it cannot listen, keys or `SOPDEPLOY_FAULTS` are wrong, or tracing is asked for
    and not installed; and what `Shelf` and `open_verified` raise for the bundles.
    """
    with bind(settings.host, settings.port) as listener:
        if settings.devices:
            with logs.configured(settings):
                return Supervisor(sources, settings, listener).run()
        return serve_on(sources, settings, Inherited(sockets=(listener,), siblings={}))


def serve_on(sources: Sequence[str | Path], settings: Settings, place: Inherited) -> int:
    """Serve the bundles at *sources* in this process, on the sockets of *place*; else as `serve`."""
    timeline = Timeline()
    timeline.mark("imports")
    prepare_process()
    allow_files(settings.max_connections)
    with ExitStack() as stack:
        stack.enter_context(logs.configured(settings))
        open_trace = stack.enter_context(open_tracing(settings))
        faults = faults_from_environment()
        health = settings.health_port
        prober = None if health is None else stack.enter_context(bind(settings.host, health))
        shelf = BundleStore(sources)
        inferences = {name: load_model(path, settings) for name, path in shelf.bundles.items()}
        timeline.add(inference.seconds for inference in inferences.values())
        control = shelf if settings.model_control else None
        app = create_app(inferences, settings, control, faults=faults, open_trace=open_trace)
        app.state.siblings = place.siblings
        names = " ".join(inference.bundle.name for inference in inferences.values())
        del inferences  # else a model of the start would keep its engine after others have replaced it
        ready = f"ready: {url(place.sockets[0])}  {names}"
        server = DrainingServer(http_config(app, settings), app.state.service, ready, timeline)
        if prober is not None:
            stack.enter_context(health_port(app.state.service, server.watch, prober))
        server.run(sockets=list(place.sockets))
        state = app.state.service.state
        log.info("stopped", extra={"state": state})
    return ENGINE_DEAD_EXIT if state == "engine_dead" else 0


def prepare_process() -> None:
    """Set what holds for all of a process that answers: how memory is kept, and that Pillow does not warn.

    To be called after the imports.
    """
    keep_little()
    collect_seldom()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels refuses such pictures
    warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, which counts for nothing


def http_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return how uvicorn runs *app*: with every limit of *settings* on the wire."""
    wire = functools.partial(LimitedHttpProtocol, Connections(settings, app.state.service.metrics))
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], wire),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks where a client is
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )


def health_port(service: Service, watch: LoopWatch, listener: socket.socket) -> AbstractContextManager[None]:
    """Answer for the health of *service* on *listener*, in a thread, until the block ends."""
    app = health_app(
        lambda: service.state, service.metrics.render, watch, service.settings.max_loop_lag_seconds
    )
    sys.stdout.write(f"health: {url(listener)}\n")
    return answering(app, listener)


class DrainingServer(uvicorn.Server):
    """A uvicorn that goes on answering while it drains, and ends when the engine is dead.

    The first signal makes the server not ready: new requests get 503, those already here are
    answered for at most `drain_seconds`, then the port is closed. Who was connected by then may still ask
    and gets 503. A second signal ends the drain: what is not answered by then gets 503.
    """

    def __init__(self, config: uvicorn.Config, service: Service, ready: str, timeline: Timeline) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = service.settings.drain_seconds
        self._ready = ready
        self._timeline = timeline
        self._drain_until: float | None = None
        self._drain_told = False
        self.watch = LoopWatch()
        self._rest = Rest(give_back_in_a_thread)
        service.metrics.loop_lag(self.watch.worst)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port and say so."""
        try:
            await super().startup(sockets)
        except OSError as problem:
            raise ConfigError(f"cannot listen ({problem.strerror}); choose another port") from problem
        sys.stdout.write(self._ready + "\n")
        sys.stdout.flush()
        self._timeline.mark("listen")
        self._timeline.log()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to drain, or end the drain; uvicorn's own would end with the signal's exit code."""
        again = self._drain_until is not None
        self._drain_until = time.monotonic() + (0.0 if again else self._drain_seconds)
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to close the port now; uvicorn asks ten times a second."""
        self.watch.beat()
        self._rest.tick(time.monotonic(), self._service.active_requests)
        if self._service.state == "engine_dead":
            return True
        if self._drain_until is not None:
            self._tell_drain()
            late = time.monotonic() >= self._drain_until
            if late:
                self._service.abort()
            if late or self._service.active_requests == 0:
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, answer who has come through it, and end."""
        # An engine that is dead leaves who waits at the port to other processes that listen there.
        if self._drain_until is not None:
            late = [connection for listener in sockets or [] for connection in take_in(listener)]
            for server in self.servers:
                server.close()
            loop = asyncio.get_running_loop()
            for connection in late:
                await loop.connect_accepted_socket(self._protocol, connection)
            await self._answer_the_last()
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        protocol = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def _answer_the_last(self) -> None:
        end = time.monotonic() + LAST_SECONDS
        asking = True
        while asking and time.monotonic() < end:
            await asyncio.sleep(GLANCE_SECONDS)  # first: what has arrived was not read yet
            wires = cast(set[LimitedHttpProtocol], self.server_state.connections)
            asking = any(wire.timeout_keep_alive_task is None for wire in wires)  # it runs for idle ones

    def _tell_drain(self) -> None:  # not in the signal's handler, which may interrupt a line of the log
        if not self._drain_told:
            self._drain_told = True
            log.info(
                "draining", extra={"requests": self._service.active_requests, "seconds": self._drain_seconds}
            )
