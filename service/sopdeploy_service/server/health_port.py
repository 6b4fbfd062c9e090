"""Liveness, readiness and metrics on a separate thread and port, independent of the service's event loop."""

import asyncio
import functools
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sopdeploy_service.api.schema import Health
from sopdeploy_service.http.middleware import BodyLimitsMiddleware
from sopdeploy_service.inference.service import State
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.http_protocol import Connections, LimitedHttpProtocol
from sopdeploy_service.server.loop_watch import LoopWatch
from sopdeploy_service.settings import Settings

JOIN_SECONDS = 5.0
MAX_CONNECTIONS = 64  # included in `OTHER_FILES`, with as many pending ones
# Health checks are small and come from nearby; these limits do not depend on the service's settings.
LIMITS: dict[str, Any] = {
    "max_connections": MAX_CONNECTIONS,
    "header_timeout": 2.0,
    "write_timeout": 5.0,
    "max_body_bytes": 1000,
}


def health_app(
    state: Callable[[], State], render: Callable[[], Awaitable[bytes]], watch: LoopWatch, max_lag: float
) -> Starlette:
    """Create the app of the health port; it calls *state* and *render* on another thread."""

    async def respond(request: Request) -> Response:
        if request.url.path == "/metrics":
            return Response(await render(), media_type=CONTENT_TYPE_LATEST)
        current: State = "loop_blocked" if watch.lag() > max_lag else state()
        if request.url.path == "/readyz":
            healthy = current == "ok"
        else:
            healthy = current not in {"runtime_dead", "loop_blocked"}
        body = Health(status=current).model_dump_json()
        return Response(body, status_code=200 if healthy else 503, media_type="application/json")

    limits = Middleware(BodyLimitsMiddleware, settings=Settings.model_construct(**LIMITS), metrics=Metrics())
    return Starlette(
        routes=[Route(path, respond) for path in ("/livez", "/readyz", "/metrics")],
        middleware=[limits],
    )


@contextmanager
def run_in_thread(app: Starlette, listener: socket.socket) -> Iterator[None]:
    """Serve *app* on the bound *listener* in a separate thread for the duration of the block."""
    shared = Connections(Settings.model_construct(**LIMITS), Metrics(), short_lived=True)
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], functools.partial(LimitedHttpProtocol, shared)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=MAX_CONNECTIONS,
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
