"""The middleware around every request: context, guard, metrics and access log.

A guard refuses foreign pages, or requests without a key, before the body is read. Plain ASGI
middleware: Starlette's `BaseHTTPMiddleware` hides client disconnects from the routes.
"""

import logging
import random
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy_service.http.api_keys import KeyRing, TokenBucket
from sopdeploy_service.http.problems import INTERNAL, body_too_large, respond_with_error
from sopdeploy_service.inference.results import CLIENT_GONE, HttpError, RejectedError
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.origins import (
    FOREIGN_PAGES,
    OwnOrigins,
    is_among,
    join_headers,
    parse_host,
    without_prefix,
)
from sopdeploy_service.settings import Settings

ATTEMPT_HEADER = "x-request-attempt"
VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # other characters could forge log lines

PROBES = frozenset({"/livez", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready"})
PAGE_FILES = {
    "/docs/swagger-ui-bundle.js": "text/javascript",
    "/docs/swagger-ui.css": "text/css",
}
PAGES = {"/", "/docs", "/errors"}  # the form for the key and error pages, without model data
METRICS_PATH = "/metrics"
OPEN = PROBES | PAGES | PAGE_FILES.keys()  # without a key
MONITORING = PROBES | {METRICS_PATH}  # successful requests are logged at debug level

NO_KEY = HttpError(
    "unauthenticated",
    401,
    "missing or unknown key; send `Authorization: Bearer KEY` or `X-API-Key: KEY`",
)
OUT_OF_MEMORY = HttpError(
    "out_of_memory", 503, "the server has too little memory for this; retry later", 2
)
ALLOW_HOST = "list the name that clients use in the setting allowed_hosts"
ALLOW_PAGE = (
    "list the address of the page, such as https://shop.example, in the setting allowed_origins"
)

log = logging.getLogger("sopdeploy.http")
access_log = logging.getLogger("sopdeploy.access")


@dataclass(slots=True)
class RequestContext:
    """The state of one request: `scope["state"]["context"]`, written to metrics and access log at its end.

    `headers` are those of `join_headers`, `path` is below `root_path`, `peer` is the address of
    the client or of the proxy. `stage_seconds` maps each stage to the time of the slowest
    image.
    """

    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str = ""
    peer: str = ""
    key_name: str | None = None
    rate_limit: TokenBucket | None = None
    model_name: str = ""
    model_digest: str = ""
    bytes: int = 0
    num_images: int = 0
    code: str = "ok"
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def server_timing(self) -> str:
        """Format the value of the `Server-Timing` header; durations are in milliseconds."""
        return ", ".join(
            [f"{stage};dur={spent * 1000:.2f}" for stage, spent in self.stage_seconds.items()]
        )


Guard: TypeAlias = Callable[[RequestContext], None]


@dataclass(eq=False)
class RequestContextMiddleware:
    """Creates the `RequestContext` of each request, calls *guards*, and records the request when it ends."""

    app: ASGIApp
    service: Service
    guards: Sequence[Guard]  # the first one that refuses raises `RejectedError`

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; an exception becomes a problem unless the response has started."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = time.monotonic()
        context = self._add_context(scope)

        # A copy: the server, which omits the body after HEAD, reads the method from its own
        # scope.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status = 0  # until the response starts

        async def send_with_headers(message: Message) -> None:
            """Send *message*; note its status, and add the headers of the context."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                headers.append((b"x-request-id", context.request_id.encode()))
                if context.model_digest:
                    headers.append((b"x-model-digest", context.model_digest.encode()))
                if context.rate_limit is not None:
                    limits = context.rate_limit.headers().items()
                    headers += [
                        (name.lower().encode(), value.encode()) for name, value in limits
                    ]
            await send(message)

        # The length and the guards refuse before the body is read; then the app gets the request.
        self.service.active_requests += 1
        try:
            limit = self.service.settings.max_body_bytes
            announced_length = context.headers.get("content-length", "0")
            if int(announced_length) > limit:  # the server has checked that it is a number
                raise body_too_large(context.headers, limit)

            for guard in self.guards:
                guard(context)
            await self.app(inner, receive, send_with_headers)
        except Exception as error:  # a defect fails its own request
            reason = self._record_error(error, inner)
            if status:
                raise  # part of the response was sent: the connection must be closed
            await respond_with_error(scope, reason)(scope, receive, send_with_headers)
        finally:
            self.service.active_requests -= 1

            seconds = time.monotonic() - started
            # The router has added it to the scope with which the app was called.
            route = inner.get("route")
            self._record(context, scope["method"], route, status, seconds)

    def _add_context(self, scope: Scope) -> RequestContext:
        """Add the context of a request to *scope*, with its prefix and path; return the context."""
        headers = join_headers(scope["headers"])
        if len(headers) < len(scope["headers"]):  # the routes must read joined ones, too
            pairs = headers.items()
            scope["headers"] = [
                (name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs
            ]

        # Two prefixes can be in front of the path: first that of the server or mount, then that
        # of the setting, unless a proxy has removed it. The one of the setting is the root of
        # links; without it, the other one is.
        root = self.service.settings.root_path
        given_root = scope.get("root_path", "")
        path = without_prefix(without_prefix(scope["path"], given_root), root)
        root = root or given_root
        scope["root_path"] = root
        scope["path"] = root + path

        peer = scope["client"][0] if scope.get("client") else ""
        context = RequestContext(request_id(headers), headers, path, peer)
        scope.setdefault("state", {})["context"] = context
        return context

    def _record_error(self, error: Exception, scope: Scope) -> HttpError:
        """Count *error*, or log it if it is a defect; return the `HttpError` that answers it."""
        if isinstance(error, MemoryError):
            log.warning("out of memory in %s", getattr(scope.get("route"), "path", "other"))
            error = RejectedError(OUT_OF_MEMORY)

        if not isinstance(error, RejectedError):
            log.exception("internal error in %s", getattr(scope.get("route"), "path", "other"))
            return INTERNAL

        if error.reason is not CLIENT_GONE:
            self.service.metrics.rejected.labels(error.reason.code).inc()
        return error.reason

    def _record(
        self, context: RequestContext, method: str, route: object, status: int, seconds: float
    ) -> None:
        """Record a request in metrics and access log; *status* is 0 if no response was sent."""
        # The template of the path has few values, whatever clients send.
        path = getattr(route, "path", "other")
        attempt = context.headers.get(ATTEMPT_HEADER)
        self.service.metrics.count_request(
            path,
            status,
            seconds,
            context.model_name,
            attempt,
            "" if context.code == "ok" else context.code,
        )

        log_request(context, method, path, status, seconds)


def record_refusal(
    service_metrics: Metrics,
    settings: Settings,
    context: RequestContext,
    method: str,
    reason: HttpError,
) -> dict[str, str]:
    """Count and log a request that is refused with *reason* before the app gets it.

    Returns the headers that every response has, also those by which a page of another host may
    read it.
    """
    attempt = context.headers.get(ATTEMPT_HEADER)
    service_metrics.count_request(
        "other", reason.status, 0.0, attempt=attempt, reason=reason.code
    )
    context.code = reason.code
    log_request(context, method, "other", reason.status, 0.0)

    headers = {"X-Request-ID": context.request_id}
    if settings.allowed_origins:
        origin = context.headers.get("origin", "")
        headers |= AllowedOrigins.headers_for(origin, settings.allowed_origins)
    return headers


def log_request(
    context: RequestContext,
    method: str,
    path: str,
    status: int,
    seconds: float,
) -> None:
    """Write a request to the access log; *path* is the template of its route."""
    is_success = 200 <= status < 400
    level = logging.DEBUG if path in MONITORING and is_success else logging.INFO
    if not access_log.isEnabledFor(level):
        return

    # Describe the request; what it does not have is left out.
    fields = {
        "request": context.request_id,
        "key": context.key_name,
        "method": method or None,
        "route": path,
        "status": status,
        "code": context.code,
        "model": context.model_name or None,
        "digest": context.model_digest or None,
        "num_images": context.num_images,
        "bytes": context.bytes,
        "ms": round(seconds * 1000, 2),
        "stages_ms": {
            name: round(spent * 1000, 2) for name, spent in context.stage_seconds.items()
        },
    }

    extra = {name: value for name, value in fields.items() if value is not None}
    access_log.log(level, "request", extra=extra)


def request_id(headers: Mapping[str, str]) -> str:
    """Return the client's `X-Request-ID` if it is valid, or a new ID of 32 hexadecimal digits."""
    sent = headers.get("x-request-id", "")
    if VALID_ID.fullmatch(sent):
        return sent
    # Without a system call, which would release the GIL; a fork gets other numbers.
    return f"{random.getrandbits(128):032x}"


class OriginGuard:
    """Refuses requests for foreign hosts and of foreign pages with 403, except those for `OPEN`."""

    def __init__(self, settings: Settings) -> None:
        self._origins = OwnOrigins(
            names=("localhost", settings.host),
            allowed=settings.allowed_hosts,
            proxies=settings.trusted_proxies,
            pages=settings.allowed_origins,
            scheme=settings.scheme,
        )

    def __call__(self, context: RequestContext) -> None:
        """Raise `RejectedError` unless the request is allowed."""
        if context.path in OPEN:
            return

        if foreign := self._origins.why_foreign(context.headers, context.peer):
            advice = ALLOW_PAGE if foreign == FOREIGN_PAGES else ALLOW_HOST
            message = f"this server refuses {foreign}; {advice}"
            raise RejectedError(HttpError("foreign_request", 403, message))


async def _no_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to nothing."""


class AllowedOrigins(CORSMiddleware):
    """Lets pages of *origins*, patterns of `parse_host` or `*` for all, read responses and send all headers.

    It answers the requests by which browsers ask before (`OPTIONS`), before any guard, because
    they carry no key. Unless all pages are allowed, responses vary with `Origin`, also errors.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=["*"] if "*" in origins else [],
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],  # means all of them, because no response allows credentials
            allow_private_network=True,  # a public page may use a server in a private network
        )

        self._patterns = [parse_host(origin) for origin in origins if origin != "*"]

    @classmethod
    def headers_for(cls, origin: str, origins: Sequence[str]) -> dict[str, str]:
        """Return the headers with which a page at *origin* reads a response that the app has not made."""
        answers = cls(_no_app, origins)
        headers = {} if answers.allow_all_origins else {"Vary": "Origin"}
        if origin and answers.is_allowed_origin(origin):
            allowed = "*" if answers.allow_all_origins else origin
            headers["Access-Control-Allow-Origin"] = allowed
            headers["Access-Control-Expose-Headers"] = "*"
        return headers

    def is_allowed_origin(self, origin: str) -> bool:
        """Tell whether pages of *origin* may read responses."""
        return self.allow_all_origins or is_among(origin, self._patterns)


class KeyGuard:
    """Refuses requests without one of *keys* with 401, except those for *open_paths*."""

    def __init__(self, keys: KeyRing, open_paths: Collection[str]) -> None:
        self._keys = keys
        self._open_paths = open_paths

    def __call__(self, context: RequestContext) -> None:
        """Raise `RejectedError` unless the request is allowed; set key and rate limit."""
        if context.path in self._open_paths:
            return

        scheme, _, token = context.headers.get("authorization", "").partition(" ")
        secret = (
            token.strip()
            if scheme.lower() == "bearer"
            else context.headers.get("x-api-key", "")
        )

        accepted = self._keys.find(secret.encode("latin-1"))
        if accepted is None:
            raise RejectedError(NO_KEY)
        key, context.rate_limit = accepted
        context.key_name = key.name
