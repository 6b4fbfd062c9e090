"""The envelope of every answer: its headers, its place in the metrics, and a net under mistakes.

Pure ASGI: Starlette's `BaseHTTPMiddleware` would hide from the routes that a client has left.
"""

import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy_service.problems import INTERNAL, problem_response
from sopdeploy_service.service import Service

GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # anything else could forge lines of a log

log = logging.getLogger("sopdeploy.http")


class Envelope:
    """Wraps *app*, whose requests *service* answers."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        scope.setdefault("state", {})
        stamp = Stamp(send, request_id(scope), scope["state"])
        self._service.requests += 1
        try:
            await self._app(scope, receive, stamp)
        except Exception:  # a mistake of ours; the client gets a problem, the log a traceback
            log.exception("%s %s", scope["method"], scope["path"])
            if stamp.status:
                raise  # half an answer is out; the connection must end
            await problem_response(INTERNAL, path=scope["path"])(scope, receive, stamp)
        finally:
            self._service.requests -= 1
            self._count(scope, stamp.status, time.monotonic() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # the template: clients cannot make new ones
        model = scope["state"].get("model")
        name = model.name if model is not None else ""
        self._service.metrics.request(route, status, seconds, name)


class Stamp:
    """A `send` that adds the headers every answer has and remembers the status; 0 is none yet.

    *state* is the request's: a route that has chosen a `Model` keeps it there as `model`.
    """

    def __init__(self, send: Send, request: str, state: MutableMapping[str, Any]) -> None:
        self.status = 0
        self._send = send
        self._request = request
        self._state = state

    async def __call__(self, message: Message) -> None:
        """Send *message* on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request
            model = self._state.get("model")
            if model is not None:
                headers["X-Model-Digest"] = model.version
        await self._send(message)


def request_id(scope: Scope) -> str:
    """Return the client's `X-Request-ID` where it is harmless, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex
