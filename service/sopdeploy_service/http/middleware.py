"""Outermost middleware: request context, response headers, metrics, access log and internal errors.

Plain ASGI middleware: Starlette's `BaseHTTPMiddleware` hides client disconnects from the routes.
"""

import itertools
import logging
import re
import secrets
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy_service.http.problems import INTERNAL, reject
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.logs import PROBES, log_request
from sopdeploy_service.observability.request_context import OpenTrace, RequestContext

VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # other characters could forge log lines
PROCESS_ID = secrets.token_hex(8)  # random once per process: random bytes per request need a system call
NUMBERS = itertools.count()

log = logging.getLogger("sopdeploy.http")


class RequestContextMiddleware:
    """Creates the `RequestContext` of each request and records the request when it ends."""

    def __init__(self, app: ASGIApp, service: Service, open_trace: OpenTrace | None = None) -> None:
        self._app = app
        self._service = service
        self._open_trace = open_trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; an exception becomes a 500 problem unless the response has started."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        context = RequestContext(request_id(headers))
        if self._open_trace is not None and scope["path"] not in PROBES:
            context.trace = self._open_trace(headers, started)
        scope.setdefault("state", {})["context"] = context
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].extend(_response_headers(context))
            await send(message)

        self._service.active_requests += 1
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("internal error in %s", _route(scope))
            if status:
                raise  # part of the response was sent: the connection must be closed
            await reject(scope, INTERNAL)(scope, receive, send_with_headers)
        finally:
            self._service.active_requests -= 1
            seconds = time.monotonic() - started
            self._service.metrics.request(_route(scope), status, seconds, context.model_name)
            if context.trace is not None:
                context.trace.end(_route(scope), status, context.spans)
            log_request(context, scope["method"], _route(scope), status, seconds)


class HeadMiddleware:
    """Handles `HEAD` requests like `GET`; the server omits the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        get_scope = {**scope, "method": "GET"}  # a copy: the server reads the method from its own scope
        try:
            await self._app(get_scope, receive, send)
        finally:
            if "route" in get_scope:
                scope["route"] = get_scope["route"]


def request_id(headers: Headers) -> str:
    """Choose the client's `X-Request-ID` if it is valid, else a new ID of 32 hexadecimal digits."""
    given = headers.get("x-request-id", "")
    return given if VALID_ID.fullmatch(given) else f"{PROCESS_ID}{next(NUMBERS):016x}"


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "other")  # the template: few values, whatever clients send


def _response_headers(context: RequestContext) -> list[tuple[bytes, bytes]]:
    found = {"x-request-id": context.request_id}
    if context.model_version:
        found["x-model-digest"] = context.model_version
    if context.rate_limit is not None:
        found |= context.rate_limit.headers()
    return [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in found.items()]
