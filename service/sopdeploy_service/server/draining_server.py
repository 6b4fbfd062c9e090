"""A uvicorn server with the limits of the settings, which drains before it ends."""

import asyncio
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from sopdeploy.errors import ConfigError, RuntimeUnavailableError, SopdeployError, first_line
from sopdeploy_service.http.api_keys import KeyRing, read_again
from sopdeploy_service.inference.bundle_store import read_links
from sopdeploy_service.inference.service import Service
from sopdeploy_service.server.connections import Connections
from sopdeploy_service.server.http_protocol import LimitedHttpProtocol, limited_config
from sopdeploy_service.server.lifetime import (
    EXIT_RUNTIME_DEAD,
    Joined,
    follow,
    follow_keys,
    terminal_is_closed,
)
from sopdeploy_service.server.sockets import MAX_PENDING, Arrivals, accept_pending, announce
from sopdeploy_service.server.tls import expiry, tls_context
from sopdeploy_service.settings import Settings
from sopdeploy_service.tasks import start_task

LAST_SECONDS = 1.0  # for connections that are open without a request when the port closes
_POLL_SECONDS = 0.02
# Threshold of the youngest generation of the garbage collector; Python's default is 700
_YOUNG_OBJECTS = 10_000

log = logging.getLogger("sopdeploy.server")


def freeze_objects() -> None:
    """Make garbage collections rare and exclude the objects that exist; call it after the imports.

    A collection stops all threads; scanning imported objects takes 45 ms, and a request leaves
    no garbage.
    """
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])


def http_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Create the uvicorn configuration of *app* with the connection limits of *settings*; raises `ConfigError`."""
    app.state.connections = Connections(
        settings, app.state.service.metrics, tls_context(settings)
    )
    return limited_config(app, app.state.connections)


class AppLifespan:
    """Starts and stops an app; uvicorn's class would log the traceback of an error, and exit with 3."""

    def __init__(self, app: FastAPI) -> None:
        self._context = app.router.lifespan_context(app)
        self.state: dict[str, Any] = {}  # uvicorn reads this and the following
        self.should_exit = False

    async def startup(self) -> None:
        """Start the app; raises `SopdeployError`, whatever error it is."""
        try:
            await self._context.__aenter__()
        except SopdeployError:
            raise
        except Exception as error:  # of any library; the process ends with one line
            reason = f"the server cannot start ({first_line(error)}); check the limits of this system"
            raise RuntimeUnavailableError(reason) from error

    async def shutdown(self) -> None:
        """Stop the app."""
        await self._context.__aexit__(None, None, None)


def follow_links(
    tasks: set[asyncio.Task[None]], links: Mapping[Path, Path], reload: Callable[[], object]
) -> None:
    """Start one of *tasks* that calls *reload* when one of *links* leads elsewhere; none without links."""
    if links:
        start_task(tasks, follow(partial(read_links, links), links, reload))


class DrainingServer(uvicorn.Server):
    """A uvicorn server that responds while it drains, and exits when a runtime is dead.

    SIGTERM makes the server not ready. For `lame_duck_seconds`, in which proxies notice that, it
    serves all requests, and every response closes its connection. Then the port is closed, and what
    has arrived is completed within `drain_seconds`. Without such a time, and after another signal,
    new requests get 503, admitted ones are completed within `drain_seconds`, and the port is
    closed. Connections that are open by then may send one more request, which gets 503. A second
    signal ends the drain: unfinished requests get 503.

    SIGHUP reloads the bundles of *sources* and the API keys. A move of one of *links*, which maps
    them to where they lead now, reloads the bundles. With `follow`, a change of the key file
    reloads the keys, and a reload that fails is tried again.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        sources: Sequence[str | Path] = (),
        links: Mapping[Path, Path] | None = None,
    ) -> None:
        super().__init__(http_config(app, settings))
        self._app = app
        self._service = cast(Service, app.state.service)
        self._connections = cast(Connections, app.state.connections)
        self.bundles = " ".join(model.bundle.name for model in self._service.registry.models())
        self._sources = sources
        self._links = links or {}

        # The tasks that follow links and files, and that begin connections; the end of the server
        # does not wait for them.
        self._background: set[asyncio.Task[None]] = set()
        self._bundle_reload = Joined(self._reload_bundles, tries_again=settings.follow)
        self._key_reload = Joined(self._reload_keys, tries_again=settings.follow)

        if settings.ssl_certfile is not None:
            self._service.metrics.certificate_expiry.set(expiry(settings.ssl_certfile))
        self._listeners: Sequence[socket.socket] = ()
        self._arrivals: list[Arrivals] = []  # of HTTPS

        # After a signal: when the port closes, if it stays open, and when unfinished requests get 503.
        self._open_until: float | None = None
        self._drain_until: float | None = None
        self._has_logged_drain = self._is_closed = False  # the port is closed

    @property
    def _drains(self) -> bool:
        """Whether a signal has begun the drain."""
        return self._drain_until is not None

    def serve_until_end(self, *listeners: socket.socket) -> int:
        """Serve on *listeners* until a signal or the death of a runtime; return the exit code.

        Raises `OSError` if the `ready` line cannot be printed.
        """
        freeze_objects()
        self.run(sockets=list(listeners))
        state = self._service.state
        log.info("stopped", extra={"state": state})
        return EXIT_RUNTIME_DEAD if state == "runtime_dead" else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, serve the connections of *sockets*, if there are any, and call `on_open`."""
        self.lifespan = AppLifespan(self._app)  # instead of uvicorn's own
        await super().startup([])
        self._listeners = sockets or ()
        for listener in self._listeners:
            await self._open_port(listener)

        # Follow the signals, the links and the key file that lead to reloads.
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.on_hangup)

        follow_links(self._background, self._links, self.reload_bundles)
        follow_keys(self._background, self._service.settings, self._key_reload.request)
        self.on_open(sockets or [])
        log.info("started", extra={"bundles": self.bundles})

    async def _open_port(self, listener: socket.socket) -> None:
        """Serve the connections of *listener*; raises `ConfigError`."""
        loop = asyncio.get_running_loop()
        try:
            # With HTTPS, asyncio tells of a connection only after its handshake.
            if self._connections.tls is not None:
                arrivals = Arrivals(listener, lambda: self._serve_arrivals(arrivals))
                arrivals.open()
                self._arrivals.append(arrivals)
                return

            server = await loop.create_server(
                self._create_protocol, sock=listener, backlog=MAX_PENDING
            )
        except OSError as problem:
            raise ConfigError(
                f"cannot listen ({problem.strerror}); choose another port"
            ) from problem
        self.servers.append(server)

    def _serve_arrivals(self, arrivals: Arrivals) -> None:
        while arrivals:
            start_task(self._background, self.serve_connections([arrivals.take()]))

    def _create_protocol(self) -> LimitedHttpProtocol:
        create = cast(Callable[..., LimitedHttpProtocol], self.config.http_protocol_class)
        return create(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )

    def on_open(self, sockets: Sequence[socket.socket]) -> None:
        """Print that the server is ready on *sockets*."""
        announce(sockets[0], self._service.settings.scheme, self.bundles)

    async def serve_connections(self, connections: Sequence[socket.socket]) -> None:
        """Serve accepted *connections*; with HTTPS, this takes until the end of their handshakes."""
        await asyncio.gather(
            *map(self._serve_connection, connections),
            return_exceptions=True,  # one that cannot be served does not concern the others
        )

    async def _serve_connection(self, connection: socket.socket) -> None:
        tls = self._connections.tls
        if tls is None:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(self._create_protocol, connection)
        else:
            await self._create_protocol().shake_hands(connection, tls)

    def on_hangup(self) -> None:
        """Drain if the terminal was closed; a SIGHUP that a program sends reloads bundles and keys."""
        if terminal_is_closed():
            self.handle_exit(signal.SIGHUP, None)
        else:
            self._key_reload.request()
            self.reload_bundles()

    def reload_bundles(self) -> None:
        """Begin to serve bundles that have changed, unless the server drains."""
        self._bundle_reload.request()

    async def _reload_bundles(self) -> bool:
        return self._drains or await self._service.registry.reload(self._sources)

    async def _reload_keys(self) -> bool:
        """Accept the keys that the file has now; return whether it can be read."""
        ring = cast(KeyRing | None, self._app.state.keys)
        if ring is None:
            return True

        keys = await read_again(self._service.settings, self._service.metrics.keys_unreadable)
        if keys is None:
            return False
        if keys != ring.keys:
            ring.replace(keys)
            log.info("keys reloaded", extra={"keys": len(keys)})
        return True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Start to leave, or end the drain; uvicorn would exit with the code of the signal."""
        now = time.monotonic()
        settings = self._service.settings
        if self._drains:
            self._drain_until = now
            return

        # Only SIGTERM comes from what also stops proxies from sending further requests.
        serves_on = settings.lame_duck_seconds if sig == signal.SIGTERM else 0.0
        self._drain_until = now + serves_on + settings.drain_seconds
        self._connections.leave()
        self._service.leave()
        if serves_on:
            self._open_until = now + serves_on
        else:
            self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Log the begin of a drain, abort one that is late; return whether to shut down."""
        now = time.monotonic()
        if self._service.state == "runtime_dead":
            return True

        # While it leaves, serve until proxies know, then end when no request is left, or when its
        # time is over.
        if self._drain_until is not None:
            if not self._has_logged_drain:
                # It is logged here, because a signal handler may interrupt another log line.
                self._has_logged_drain = True
                log.info(
                    "draining",
                    extra={
                        "requests": self._service.active_requests,
                        "seconds": round(self._drain_until - now, 1),
                    },
                )

            if now >= self._drain_until:
                self._service.drain(abort=True)
                return True
            if self._open_until is not None and now >= self._open_until:
                self._stop_accepting()
            is_open = self._open_until is not None and now < self._open_until
            if not is_open and self._service.active_requests == 0:
                return True

        return await super().on_tick(counter)

    def _stop_accepting(self) -> None:
        """Close the port after the lame duck; serve what has arrived by then, and what is on open connections."""
        start_task(self._background, self.serve_connections(self._close_port()))

    def _close_port(self) -> list[socket.socket]:
        """Close the port; return the connections that wait in the system's queue."""
        if self._is_closed:
            return []
        self._is_closed = True
        pending = [one for arrivals in self._arrivals for one in arrivals.close()]
        pending += [one for listener in self._listeners for one in accept_pending(listener)]
        for server in self.servers:
            server.close()
        return pending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, respond to the connections that were pending, and end."""
        # Serve what has arrived unless a runtime has died: then the process ends at once.
        pending = self._close_port()
        if self._service.state != "runtime_dead":
            await self.serve_connections(pending)

            # Give the responses time, until every connection waits for another request.
            end = time.monotonic() + LAST_SECONDS
            all_answered = False
            while not all_answered and time.monotonic() < end:
                await asyncio.sleep(_POLL_SECONDS)  # the loop reads what has arrived

                connections = cast(Iterable[LimitedHttpProtocol], self._connections.open)
                # uvicorn runs this timer while a connection waits for its next request.
                all_answered = all(
                    one.timeout_keep_alive_task is not None for one in connections
                )
        await super().shutdown(sockets)
