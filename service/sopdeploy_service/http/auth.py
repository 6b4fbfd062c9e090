"""API key authentication and rate limits, before the body of a request is read."""

import math
import time
from collections.abc import Awaitable, Callable, Collection

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from sopdeploy_service.http.api_keys import ApiKeys, Scope
from sopdeploy_service.http.problems import RejectedError, reject
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.request_context import RequestContext

PROBES = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
PAGES = frozenset({"/", "/docs", "/errors"})  # the form to enter a key and the list of errors; no model data
OPEN = PROBES | PAGES
METRICS = "/metrics"
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="sopdeploy"'}

NO_KEY = Rejection(
    "unauthenticated", 401, "missing or unknown key; send `Authorization: Bearer KEY` or `X-API-Key: KEY`"
)


class TokenBucket:
    """Holds up to *burst* tokens and gains *rate* per second; an image takes one. For one event loop."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._filled = time.monotonic()

    def check(self, images: int) -> None:
        """Raise `RejectedError` if *images* exceed the limit now; take no tokens."""
        self._fill()
        if images > self._burst:
            message = f"{images} images exceed the limit of this key ({self._burst}); send fewer per request"
            raise RejectedError(Rejection("too_many_images", 400, message))
        if images > self._tokens:
            wait = max(1, math.ceil((images - self._tokens) / self._rate))
            message = f"this key may send {self._rate:g} images per second; retry later"
            raise RejectedError(Rejection("rate_limited", 429, message, wait))

    def spend(self, images: int) -> None:
        """Take the tokens of *images*, or raise `RejectedError` and take none."""
        self.check(images)
        self._tokens -= images

    def headers(self) -> dict[str, str]:
        """Format the response headers; `Reset` is the time in seconds until the bucket is full."""
        self._fill()
        return {
            "RateLimit-Limit": str(self._burst),
            "RateLimit-Remaining": str(int(self._tokens)),
            "RateLimit-Reset": str(math.ceil((self._burst - self._tokens) / self._rate)),
        }

    def _fill(self) -> None:
        now = time.monotonic()
        self._tokens = min(float(self._burst), self._tokens + (now - self._filled) * self._rate)
        self._filled = now


class ApiKeyMiddleware:
    """Rejects requests without a known key with 401, except those for *open_paths*."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._open_paths = frozenset(open_paths)
        self._buckets = {
            key.name: TokenBucket(key.rate, key.burst) for key in keys.keys if key.rate is not None
        }

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
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


def require(context: RequestContext, scope: Scope) -> None:
    """Raise `RejectedError` (403) if the key of the request lacks *scope*; servers without keys allow all."""
    if context.scopes is not None and scope not in context.scopes:
        raise RejectedError(Rejection("forbidden", 403, f"this key does not have the scope `{scope}`"))


def needs(scope: Scope) -> Callable[[Request], Awaitable[None]]:
    """Create a FastAPI dependency that requires *scope*: `dependencies=[Depends(needs("admin"))]`."""

    async def check(request: Request) -> None:
        require(request.scope["state"]["context"], scope)

    return check
