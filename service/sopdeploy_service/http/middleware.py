"""Outer middleware: request context, API keys, response headers, metrics, access log and internal errors.

Plain ASGI middleware: Starlette's `BaseHTTPMiddleware` hides client disconnects from the routes.
"""

import itertools
import logging
import math
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy_service.http import api_keys
from sopdeploy_service.http.api_keys import ApiKeys
from sopdeploy_service.http.problems import INTERNAL, RejectedError, reject
from sopdeploy_service.http.shared_spending import SharedSpending
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.request_context import OpenTrace, RequestContext

VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # other characters could forge log lines
PROCESS_ID = secrets.token_hex(8)  # random once per process: random bytes per request need a system call
NUMBERS = itertools.count()

PROBES = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
PAGES = frozenset({"/", "/docs", "/errors"})  # the form to enter a key and the list of errors; no model data
METRICS = "/metrics"
OPEN = PROBES | PAGES  # without a key
MONITORING = PROBES | {METRICS}  # not traced; successful requests are logged at debug level
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="sopdeploy"'}

NO_KEY = Rejection(
    "unauthenticated", 401, "missing or unknown key; send `Authorization: Bearer KEY` or `X-API-Key: KEY`"
)

log = logging.getLogger("sopdeploy.http")
access_log = logging.getLogger("sopdeploy.access")


@dataclass(eq=False)
class RequestContextMiddleware:
    """Creates the `RequestContext` of each request and records the request when it ends."""

    app: ASGIApp
    service: Service
    open_trace: OpenTrace | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; an exception becomes a 500 problem unless the response has started.

        The app handles `HEAD` like `GET`; the server omits the body.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        context = RequestContext(request_id(headers))
        if self.open_trace is not None and scope["path"] not in MONITORING:
            context.trace = self.open_trace(headers, started)
        scope.setdefault("state", {})["context"] = context
        # A copy: the server reads the method from its own scope.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = {"x-request-id": context.request_id}
                if context.model_version:
                    added["x-model-digest"] = context.model_version
                if context.rate_limit is not None:
                    added |= context.rate_limit.headers()
                message["headers"] += [
                    (name.lower().encode(), value.encode()) for name, value in added.items()
                ]
            await send(message)

        self.service.active_requests += 1
        try:
            await self.app(inner, receive, send_with_headers)
        except Exception:
            log.exception("internal error in %s", getattr(inner.get("route"), "path", "other"))
            if status:
                raise  # part of the response was sent: the connection must be closed
            await reject(scope, INTERNAL)(scope, receive, send_with_headers)
        finally:
            self.service.active_requests -= 1
            seconds = time.monotonic() - started
            self._record(context, scope["method"], inner.get("route"), status, seconds)

    def _record(
        self, context: RequestContext, method: str, found: object, status: int, seconds: float
    ) -> None:
        """Write a request to the route *found* that took *seconds* to metrics, trace and access log.

        *status* is 0 if no response was sent.
        """
        route = getattr(found, "path", "other")  # the template: few values, whatever clients send
        self.service.metrics.request(route, status, seconds, context.model_name)
        if context.trace is not None:
            context.trace.end(route, status, context.spans)
        level = logging.DEBUG if route in MONITORING and status < 400 else logging.INFO
        if not access_log.isEnabledFor(level):
            return
        fields = {
            "request": context.request_id,
            "key": context.key_name,
            "method": method if method in METHODS else "other",
            "route": route,
            "status": status,
            "code": context.code,
            "model": context.model_name or None,
            "digest": context.model_version or None,
            "images": context.images,
            "bytes": context.bytes,
            "ms": round(seconds * 1000, 2),
            "stages_ms": {name: round(spent * 1000, 2) for name, spent in context.stage_seconds.items()},
            "trace": context.trace.id if context.trace is not None else None,
        }
        extra = {name: value for name, value in fields.items() if value is not None}
        access_log.log(level, "request", extra=extra)


def request_id(headers: Headers) -> str:
    """Choose the client's `X-Request-ID` if it is valid, else a new ID of 32 hexadecimal digits."""
    given = headers.get("x-request-id", "")
    return given if VALID_ID.fullmatch(given) else f"{PROCESS_ID}{next(NUMBERS):016x}"


class TokenBucket:
    """Holds up to *burst* tokens and gains *rate* per second; an image takes one. For one event loop.

    With *shared*, the other front ends take tokens of the key with this *number*, too.
    """

    def __init__(
        self, rate: float, burst: int, shared: SharedSpending | None = None, number: int = 0
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._filled = time.monotonic()
        self._shared, self._number = shared, number
        self._seen = 0.0 if shared is None else shared.others(number)

    def spend(self, images: int, *, check_only: bool = False) -> None:
        """Take the tokens of *images*, unless *check_only*.

        Raises `RejectedError`, and takes none, if *images* exceed the limit now.
        """
        self._fill()
        if images > self._burst:
            message = f"{images} images exceed the limit of this key ({self._burst}); send fewer per request"
            raise RejectedError(Rejection("too_many_images", 400, message))
        if images > self._tokens:
            wait = max(1, math.ceil((images - self._tokens) / self._rate))
            message = f"this key may send {self._rate:g} images per second; retry later"
            raise RejectedError(Rejection("rate_limited", 429, message, wait))
        if not check_only:
            self._tokens -= images
            if self._shared is not None:
                self._shared.add(self._number, images)

    def headers(self) -> dict[str, str]:
        """Format the response headers; `Reset` is the time in seconds until the bucket is full."""
        self._fill()
        return {
            "RateLimit-Limit": str(self._burst),
            "RateLimit-Remaining": str(max(0, int(self._tokens))),
            "RateLimit-Reset": str(math.ceil((self._burst - self._tokens) / self._rate)),
        }

    def _fill(self) -> None:
        now = time.monotonic()
        self._tokens = min(float(self._burst), self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._shared is not None:
            seen, self._seen = self._seen, self._shared.others(self._number)
            if self._seen > seen:  # a front end that wrote nonsense costs at most one burst at a time
                self._tokens -= min(self._seen - seen, float(self._burst))


class ApiKeyMiddleware:
    """Rejects requests without a known key with 401, except those for *open_paths*.

    It runs before the body of a request is read.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        metrics: Metrics,
        open_paths: Collection[str],
        shared: SharedSpending | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._open_paths = frozenset(open_paths)
        self._buckets = {
            key.name: TokenBucket(key.rate, key.burst, shared, number)
            for number, key in enumerate(keys.keys)
            if key.rate is not None
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            headers = Headers(scope=scope)
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            key = self._keys.find(given.encode("latin-1"))
            if key is None:
                self._metrics.rejected.labels(NO_KEY.code).inc()
                await reject(scope, NO_KEY, CHALLENGE)(scope, receive, send)
                return
            context: RequestContext = scope["state"]["context"]
            context.key_name, context.scopes = key.name, key.scopes
            context.rate_limit = self._buckets.get(key.name)
        await self._app(scope, receive, send)


def require(context: RequestContext, scope: api_keys.Scope) -> None:
    """Raise `RejectedError` (403) if the key of the request lacks *scope*; servers without keys allow all."""
    if context.scopes is not None and scope not in context.scopes:
        raise RejectedError(Rejection("forbidden", 403, f"this key does not have the scope `{scope}`"))


async def require_admin(request: Request) -> None:
    """Require the scope `admin`: a FastAPI dependency."""
    require(request.scope["state"]["context"], "admin")
