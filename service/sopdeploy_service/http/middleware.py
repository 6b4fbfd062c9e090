"""The envelope of every answer: its headers, its place in metrics, log and trace, and a net under mistakes.

Pure ASGI: Starlette's `BaseHTTPMiddleware` would hide from the routes that a client has left.
"""

import itertools
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy_service.http.headers import text
from sopdeploy_service.http.problems import INTERNAL, problem_response
from sopdeploy_service.http.rate_limit import TokenBucket
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability import logs as access_log
from sopdeploy_service.observability.request_context import CURRENT, OpenTrace, RequestContext

GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # anything else could forge lines of a log
PROCESS = secrets.token_hex(8)  # of this process, drawn once: a draw for each request would be a system call
NUMBERS = itertools.count()

log = logging.getLogger("sopdeploy.http")


class RequestContextMiddleware:
    """Wraps *app*, whose requests *service* answers; *open_trace* begins the trace of each, where traced."""

    def __init__(self, app: ASGIApp, service: Service, open_trace: OpenTrace | None = None) -> None:
        self._app = app
        self._service = service
        self._open_trace = open_trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        scope.setdefault("state", {})
        tally = scope["state"]["context"] = RequestContext(request_id(scope))
        if self._open_trace is not None and scope["path"] not in access_log.PROBES:
            tally.trace = self._open_trace(Headers(scope=scope), started)
        stamp = Stamp(send, tally, scope["state"])
        self._service.active_requests += 1
        token = CURRENT.set(tally)
        try:
            await self._answer(scope, receive, stamp)
        finally:
            CURRENT.reset(token)
            self._service.active_requests -= 1
            self._note(scope, tally, stamp.status, time.monotonic() - started)
            scope["state"].pop("model", None)  # an idle connection keeps its last scope, but no model

    async def _answer(self, scope: Scope, receive: Receive, send: "Stamp") -> None:
        try:
            await self._app(scope, receive, send.send)
        except Exception:  # a mistake of ours; the client gets a problem, the log a traceback
            log.exception("a mistake at %s", route_of(scope))
            if send.status:
                raise  # half an answer is out; the connection must end
            await problem_response(INTERNAL, path=scope["path"])(scope, receive, send.send)

    def _note(self, scope: Scope, tally: RequestContext, status: int, seconds: float) -> None:
        route = route_of(scope)
        model = scope["state"].get("model")
        if model is not None:
            tally.model_name, tally.model_version = model.name, model.version
        self._service.metrics.request(route, status, seconds, tally.model_name)
        if tally.trace is not None:
            tally.trace.end(route, status, tally.spans)
        access_log.log_request(tally, scope["method"], route, status, seconds)


class Stamp:
    """A `send` that adds the headers every answer has and remembers the status; 0 is none yet.

    *state* is the request's: a route that has chosen a `Model` keeps it there as `model`.
    """

    def __init__(self, send: Send, tally: RequestContext, state: MutableMapping[str, Any]) -> None:
        self.status = 0
        self._send = send
        self._tally = tally
        self._state = state

    async def send(self, message: Message) -> None:
        """Send *message* on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message["headers"]  # a list of this answer alone; no route sets one of these
            headers.append((b"x-request-id", self._tally.request_id.encode("ascii")))
            model = self._state.get("model")
            if model is not None:
                headers.append((b"x-model-digest", model.version.encode("ascii")))
            if isinstance(self._tally.rate_limit, TokenBucket):
                found = self._tally.rate_limit.headers().items()
                headers.extend((name.lower().encode("ascii"), value.encode("ascii")) for name, value in found)
        await self._send(message)


def route_of(scope: Scope) -> str:
    """Return the template of the route, or `other`: clients cannot make new ones."""
    return getattr(scope.get("route"), "path", "other")


def request_id(scope: Scope) -> str:
    """Return the client's `X-Request-ID` where it is harmless, else a new one of 32 hexadecimal digits."""
    given = text(scope, b"x-request-id")
    return given if given and GOOD_ID.fullmatch(given) else f"{PROCESS}{next(NUMBERS):016x}"
