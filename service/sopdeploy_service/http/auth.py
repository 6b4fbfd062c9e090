"""Who may pass: every path needs a key, but for those that are known to be open.

Pure ASGI and in front of everything that reads a body: a stranger costs this server one head of a request.
"""

from collections.abc import Awaitable, Callable, Collection

from fastapi import Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from sopdeploy_service.http.api_keys import ApiKeys, Scope
from sopdeploy_service.http.headers import header
from sopdeploy_service.http.problems import RejectedError, problem_response
from sopdeploy_service.http.rate_limit import TokenBucket
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.request_context import CURRENT

PROBES = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})  # a probe has no key
# Without these nobody could type a key in or read what an error means; they hold nothing of the models.
PAGES = frozenset({"/", "/docs", "/errors"})
OPEN = PROBES | PAGES
METRICS = "/metrics"
CHALLENGE = 'Bearer realm="sopdeploy"'

NO_KEY = Rejection(
    "unauthenticated", 401, "send a key: `Authorization: Bearer KEY` or `X-API-Key: KEY`; this one is unknown"
)


class Gate:
    """Wraps *app*; lets through who has a key of *ring*, and everybody on the paths in *open_paths*."""

    def __init__(self, app: ASGIApp, ring: ApiKeys, metrics: Metrics, open_paths: Collection[str]) -> None:
        self._app = app
        self._ring = ring
        self._metrics = metrics
        self._open = frozenset(open_paths)
        self._buckets = {
            key.name: TokenBucket(key.rate, key.burst) for key in ring.keys if key.rate is not None
        }

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        key = self._ring.find(given_key(scope))
        if key is None:
            self._metrics.rejected(NO_KEY.code)
            await problem_response(NO_KEY, {"WWW-Authenticate": CHALLENGE})(scope, receive, send)
            return
        tally = CURRENT.get()
        if tally is not None:
            tally.key_name, tally.scopes = key.name, key.scopes
            tally.rate_limit = self._buckets.get(key.name)
        await self._app(scope, receive, send)


def given_key(scope: AsgiScope) -> bytes:
    """Return the key of the request in *scope* as its bytes came; empty where there is none."""
    kind, _, token = (header(scope, b"authorization") or b"").partition(b" ")
    return token.strip() if kind.lower() == b"bearer" else header(scope, b"x-api-key") or b""


def require(scope: Scope) -> None:
    """Let the request of this task go on if its key has *scope*, or where no keys are set.

    Raises `RefusedError` (403).
    """
    tally = CURRENT.get()
    if tally is not None and tally.scopes is not None and scope not in tally.scopes:
        raise RejectedError(Rejection("forbidden", 403, f"this key has no scope `{scope}`"))


def needs(scope: Scope) -> Callable[[Request], Awaitable[None]]:
    """Return a FastAPI dependency: `dependencies=[Depends(needs("admin"))]` keeps a route for such keys."""

    async def check(_request: Request) -> None:
        require(scope)

    return check
