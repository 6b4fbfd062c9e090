"""Liveness on a thread and a port of its own, so that it is answered while the service's loop is not."""

import asyncio
import functools
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sopdeploy_service.api.schema import Health
from sopdeploy_service.http.problems import json_response
from sopdeploy_service.inference.service import State
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.connection_limits import Fleeting
from sopdeploy_service.server.http_protocol import LimitedHttpProtocol
from sopdeploy_service.settings import Settings

BEAT_SECONDS = 0.1  # how often uvicorn ticks
BEATS = 100  # the last ten seconds
JOIN_SECONDS = 5.0
MOST = 64  # connections; as many more may wait to be accepted, all out of `OTHER_FILES`
# Whoever probes is near and asks little. Not from the environment: these are not the service's limits.
LIMITS: dict[str, Any] = {
    "max_connections": MOST,
    "head_seconds": 2.0,
    "write_seconds": 5.0,
    "max_body_bytes": 1000,
}


class LoopWatch:
    """How late an event loop is. `beat` is called on it, the rest by any thread."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._lags: deque[float] = deque(maxlen=BEATS)

    def beat(self) -> None:
        """Note that the loop runs; to be called every `BEAT_SECONDS`."""
        self._lags.append(self.lag())
        self._last = time.monotonic()

    def lag(self) -> float:
        """Return for how many seconds the next beat is overdue."""
        return max(0.0, time.monotonic() - self._last - BEAT_SECONDS)

    def worst(self) -> float:
        """Return the largest lag, in seconds, of the last ten seconds of beats and of now."""
        return max([*tuple(self._lags), self.lag()])


def health_app(
    state: Callable[[], State], render: Callable[[], bytes], watch: LoopWatch, max_lag: float
) -> Starlette:
    """Return the app of the health port; *state* and *render* are called on another thread."""

    def blocked() -> bool:
        return watch.lag() > max_lag

    async def livez(_request: Request) -> Response:
        found: State = "loop_blocked" if blocked() else state()
        return json_response(
            Health(status=found), status=503 if found in {"engine_dead", "loop_blocked"} else 200
        )

    async def readyz(_request: Request) -> Response:
        found: State = "loop_blocked" if blocked() else state()
        return json_response(Health(status=found), status=200 if found == "ok" else 503)

    async def metrics(_request: Request) -> Response:
        return Response(render(), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics)],
    )


@contextmanager
def answering(app: Starlette, listener: socket.socket) -> Iterator[None]:
    """Answer with *app* on *listener*, which is bound, in a thread of its own until the block ends."""
    wire = functools.partial(LimitedHttpProtocol, Fleeting(Settings.model_construct(**LIMITS), Metrics()))
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], wire),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=MOST,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(JOIN_SECONDS)
