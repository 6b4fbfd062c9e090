"""Liveness, readiness and metrics on a separate thread and port, independent of the service's event loop."""

import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sopdeploy.images.formats import too_large_error
from sopdeploy_service.api.schema import Health
from sopdeploy_service.http.problems import problem_response
from sopdeploy_service.inference.results import HttpError
from sopdeploy_service.inference.service import State
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.http_protocol import Connections, limited_config
from sopdeploy_service.server.launch import LoopWatch
from sopdeploy_service.server.sockets import bind, url
from sopdeploy_service.settings import Settings

_JOIN_SECONDS = 5.0
MAX_CONNECTIONS = 64  # included in `OTHER_FILES`, with as many pending ones
# Health checks are small and come from nearby; these limits do not depend on the service's settings.
LIMITS = Settings(max_connections=MAX_CONNECTIONS, header_timeout=2.0, write_timeout=5.0, max_body_bytes=1000)


@contextmanager
def serve_health(
    settings: Settings,
    health: Callable[[], tuple[State, str | None]],
    collect_metrics: Callable[[], Awaitable[bytes]],
    watch: LoopWatch,
) -> Iterator[str]:
    """Serve the `health_port` of *settings* in a thread during a block; print and yield its URL.

    The thread calls *health* and *collect_metrics*. *watch* measures the event loop of the service.
    """

    async def respond(request: Request) -> Response:
        if int(request.headers.get("content-length", "0")) > LIMITS.max_body_bytes:
            return problem_response(HttpError.of(too_large_error(LIMITS.max_body_bytes)))
        if request.url.path == "/metrics":
            return Response(await collect_metrics(), media_type=CONTENT_TYPE_LATEST)
        is_blocked = watch.lag() > settings.max_loop_lag_seconds
        state, reason = ("loop_blocked", None) if is_blocked else health()
        if request.url.path == "/readyz":
            healthy = state == "ok"
        else:
            healthy = state not in {"runtime_dead", "loop_blocked"}
        body = Health(status=state, reason=reason or None).model_dump_json(exclude_none=True)
        return Response(body, status_code=200 if healthy else 503, media_type="application/json")

    app = Starlette(routes=[Route(path, respond) for path in ("/livez", "/readyz", "/metrics")])
    connections = Connections(LIMITS, Metrics(), short_lived=True)
    server = uvicorn.Server(
        limited_config(
            app,
            connections,
            backlog=MAX_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
        )
    )
    with bind(settings.host, settings.health_port or 0) as listener:
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="health", daemon=True
        )
        thread.start()
        sys.stdout.write(f"health: {url(listener)}\n")
        try:
            yield url(listener)
        finally:
            server.should_exit = True
            thread.join(_JOIN_SECONDS)
