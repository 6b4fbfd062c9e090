"""`sopdeploy serve`: run one server process from verified startup to graceful shutdown.

As a program, this module is a worker process of `serve --devices`.
"""

import asyncio
import functools
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from PIL import Image
from prometheus_client import generate_latest

from sopdeploy.errors import ConfigError, SopdeployError
from sopdeploy_service.app import create_app
from sopdeploy_service.http.rate_limits import SharedSpending
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.engine_process.client import EngineClient
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability import logs
from sopdeploy_service.observability.logs import Timeline
from sopdeploy_service.observability.request_context import open_tracing
from sopdeploy_service.server import sandbox
from sopdeploy_service.server.balancing import Balancer, join_group, receive
from sopdeploy_service.server.front_ends import count_front_ends
from sopdeploy_service.server.health_port import LoopWatch, health_app, run_in_thread
from sopdeploy_service.server.http_protocol import Connections, LimitedHttpProtocol
from sopdeploy_service.server.memory import IdleTrigger, limit_heaps
from sopdeploy_service.server.sockets import accept_pending, allow_files, bind, bind_group, url
from sopdeploy_service.server.workers import USER_ERROR, Supervisor
from sopdeploy_service.settings import WORKER_VARIABLE, Settings

ENGINE_DEAD_EXIT = 70  # EX_SOFTWARE; a supervisor should restart the process
CLOSING_SECONDS = 2  # for sending the last responses after the drain
LAST_SECONDS = 1.0  # for connections that are open without a request when the port closes
POLL_SECONDS = 0.02
YOUNG_OBJECTS = 10_000  # threshold of the youngest garbage collector generation; Python's default is 700

log = logging.getLogger("sopdeploy.server")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inherited:
    """Sockets and shared memory that a process inherits from its supervisor.

    *listener* is the socket to listen on. *siblings* maps the names of all processes to their places in the
    *balancer*; *elsewhere* are the places of front ends with another engine process. *inbox* receives
    connections from other processes. A front end has a *broker*; all processes share *spending*.
    """

    listener: socket.socket
    siblings: dict[str, int] = field(default_factory=dict)
    elsewhere: Sequence[int] = ()
    balancer: Balancer | None = None
    inbox: socket.socket | None = None
    broker: socket.socket | None = None  # receives the channel to an engine process
    spending: SharedSpending | None = None


def serve(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* until SIGTERM or SIGINT.

    A source is a bundle, a directory of bundles, or `NAME=BUNDLE`. Prints one line, `ready: URL  BUNDLE ...`,
    when the probes are verified and the port is open. Returns the exit code: 0 after a drain, 70 if a runtime
    died. Raises `ConfigError` if it cannot listen, for invalid keys, and if tracing is
    not installed, and the errors of `BundleStore` and `load_model`.
    """
    count = count_front_ends(settings) * max(1, len(settings.devices))
    if settings.devices or count > 1:
        with ExitStack() as stack:
            listeners = bind_group(settings.host, settings.port, count)
            for listener in listeners:
                stack.enter_context(listener)
            stack.enter_context(logs.configured(settings))
            return Supervisor(sources, settings, listeners).run()
    with bind(settings.host, settings.port) as listener:
        return serve_on(sources, settings, Inherited(listener=listener))


def serve_on(sources: Sequence[str | Path], settings: Settings, inherited: Inherited) -> int:
    """Serve the bundles at *sources* in this process on the *inherited* listener; see `serve`."""
    timeline = Timeline()
    timeline.mark("imports")
    prepare_process()
    allow_files(settings.max_connections)
    with ExitStack() as stack:
        stack.enter_context(logs.configured(settings))
        open_trace = stack.enter_context(open_tracing(settings))
        health = None
        if settings.health_port is not None:
            health = stack.enter_context(bind(settings.host, settings.health_port))
        models: dict[str, LoadedModel] = {}
        store, engine = None, None
        if inherited.broker is not None:
            engine = EngineClient(inherited.broker)
            engine.connect()
            timeline.mark("engine")
        else:
            store = BundleStore(sources)
            models = {name: load_model(path, settings) for name, path in store.bundles.items()}
            timeline.add(model.seconds for model in models.values())
        app = create_app(
            models,
            settings,
            store if settings.model_control else None,
            open_trace=open_trace,
            engine=engine,
            spending=inherited.spending,
        )
        if inherited.balancer is not None:
            app.state.siblings = {
                name: functools.partial(inherited.balancer.connect, place)
                for name, place in inherited.siblings.items()
            }
        service: Service = app.state.service
        names = " ".join(model.bundle.name for model in models.values() or service.registry.models())
        del models  # a model that is replaced later must be freed
        ready = f"ready: {url(inherited.listener)}  {names}"
        server = DrainingServer(http_config(app, settings, inherited), service, ready, timeline, inherited)
        if health is not None:
            sys.stdout.write(f"health: {url(health)}\n")
            render = functools.partial(generate_latest, service.metrics.registry)
            probes = health_app(lambda: service.state, render, server.watch, settings.max_loop_lag_seconds)
            stack.enter_context(run_in_thread(probes, health))
        if inherited.broker is not None:
            sandbox.apply(settings, server.config)
            timeline.mark("sandbox")
        elif settings.sandbox == "auto":
            log.debug("not sandboxed: a single process also runs the models, which needs files and threads")
        server.run(sockets=[inherited.listener])
        if server.output_error is not None:
            raise server.output_error
        state = service.state
        log.info("stopped", extra={"state": state})
    return ENGINE_DEAD_EXIT if state == "engine_dead" else 0


def prepare_process() -> None:
    """Configure memory, garbage collection and Pillow's warnings; call it after the imports."""
    limit_heaps()
    # A collection stops all threads; scanning imported objects takes 45 ms, and a request leaves no garbage.
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` rejects such images
    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata, which is not used


def http_config(app: FastAPI, settings: Settings, inherited: Inherited | None = None) -> uvicorn.Config:
    """Create the uvicorn configuration of *app* with the connection limits of *settings*.

    Connections to the *inherited* listener are distributed over several processes.
    """
    connections = Connections(settings, app.state.service.metrics)
    if inherited is not None:
        connections.balancer = inherited.balancer
    protocol = functools.partial(LimitedHttpProtocol, connections)
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

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        ready: str,
        timeline: Timeline,
        inherited: Inherited,
    ) -> None:
        super().__init__(config)
        self._balancer, self._inbox = inherited.balancer, inherited.inbox
        self._elsewhere = inherited.elsewhere
        self._service = service
        self._ready = ready
        self._timeline = timeline
        self.output_error: OSError | None = None  # ends the server: nobody learns that it is ready
        self._drain_until: float | None = None
        self._drain_logged = False
        self._receiving: set[asyncio.Task[None]] = set()
        self._idle = IdleTrigger()
        self.watch = LoopWatch()
        service.metrics.loop_lag.set_function(self.watch.worst)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port and print the `ready` line."""
        try:
            await super().startup(sockets)
        except OSError as problem:
            raise ConfigError(f"cannot listen ({problem.strerror}); choose another port") from problem
        if self._balancer is not None and self._inbox is not None:
            waiting, _ = receive(self._inbox)  # left by a process that has ended
            await self._serve_connections(waiting)
            self._balancer.join()
            asyncio.get_running_loop().add_reader(self._inbox, self._receive, self._inbox)
        try:
            sys.stdout.write(self._ready + "\n")
            sys.stdout.flush()
        except OSError as problem:
            self.output_error = problem
        self._timeline.mark("listen")
        self._timeline.log()

    def _receive(self, inbox: socket.socket) -> None:
        serving = asyncio.get_running_loop().create_task(self._serve_received(*receive(inbox)))
        self._receiving.add(serving)
        serving.add_done_callback(self._receiving.discard)

    async def _serve_received(
        self, clients: Sequence[socket.socket], processes: Sequence[socket.socket]
    ) -> None:
        """Serve the connections of *clients* and of other *processes* that came through the inbox."""
        for connection in clients:
            await self._serve_connections([connection], received=True)
            if self._balancer is not None:
                self._balancer.set_taken()
        await self._serve_connections(processes, received=True)

    async def _serve_connections(
        self, connections: Sequence[socket.socket], *, received: bool = False
    ) -> None:
        """Serve accepted *connections*; if *received* from another process, they are not passed on."""
        create_protocol = functools.partial(
            cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            received=received,
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
        if self._balancer is not None:
            self._balancer.beat()
            if self._drain_until is None:
                self._avoid_dead_engine(self._balancer)
        self._idle.tick(time.monotonic(), self._service.active_requests)
        if self._service.state == "engine_dead" or self.output_error is not None:
            return True
        if self._drain_until is not None:
            if not self._drain_logged:  # a signal handler must not log: it may interrupt another log line
                self._drain_logged = True
                if self._balancer is not None:
                    self._balancer.leave()
                seconds = self._service.settings.drain_seconds
                log.info("draining", extra={"requests": self._service.active_requests, "seconds": seconds})
            expired = time.monotonic() >= self._drain_until
            if expired:
                self._service.drain(abort=True)
            if expired or self._service.active_requests == 0:
                return True
        return await super().on_tick(counter)

    def _avoid_dead_engine(self, balancer: Balancer) -> None:
        """Stop accepting connections while this device's engine is down, if another device accepts them."""
        is_up = self._service.state != "engine_restarting"
        accepting = is_up or not any(balancer.accepts(place) for place in self._elsewhere)
        balancer.set_accepting(len(self.server_state.connections), accepting=accepting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port and respond to the connections that were pending.

        After the death of a runtime, the supervisor passes pending connections to other processes.
        """
        if self._balancer is not None and self._inbox is not None:
            self._balancer.leave()
            asyncio.get_running_loop().remove_reader(self._inbox)
        if self._drain_until is not None:
            pending = [connection for listener in sockets or [] for connection in accept_pending(listener)]
            for server in self.servers:
                server.close()
            await self._serve_connections(pending)
            if self._inbox is not None:
                await self._serve_received(*receive(self._inbox))
            end = time.monotonic() + LAST_SECONDS
            busy = True
            while busy and time.monotonic() < end:
                await asyncio.sleep(POLL_SECONDS)  # the loop reads what has arrived
                protocols = cast(set[LimitedHttpProtocol], self.server_state.connections)
                busy = any(protocol.timeout_keep_alive_task is None for protocol in protocols)
        await super().shutdown(sockets)


def main() -> int:
    """Serve as one worker process of `--devices` until the parent exits; return the exit code.

    The environment variable `WORKER_VARIABLE` contains the inherited sockets, the settings and the bundles.
    """
    order: dict[str, Any] = json.loads(os.environ.pop(WORKER_VARIABLE))

    def stop_with_parent() -> None:
        os.read(order["lifeline"], 1)  # returns when the parent closes the pipe, or dies
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_parent, name="lifeline", daemon=True).start()
    balancer, inbox = join_group(order["group"]) if order["group"] else (None, None)
    inherited = Inherited(
        listener=socket.socket(fileno=order["listener"]),
        siblings=order["siblings"],
        elsewhere=order["elsewhere"],
        balancer=balancer,
        inbox=inbox,
        broker=socket.socket(fileno=order["broker"]) if "broker" in order else None,
        spending=SharedSpending(*order["spending"]) if "spending" in order else None,
    )
    try:
        return serve_on(order["sources"], Settings(**{**order["settings"], "devices": ()}), inherited)
    except ConnectionError:  # the supervisor has ended, or cannot start an engine
        return 1
    except SopdeployError as problem:
        sys.stderr.write(f"error: device {order['name'] or 'default'}: {problem} [{problem.code}]\n")
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
