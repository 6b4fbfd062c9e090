"""`HEAD` where there is `GET` (RFC 9110, 9.1): the same answer, whose body the server leaves away.

FastAPI gives a route the methods it names, and describes each. So this happens in front of the routes, once.
"""

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadRequests:
    """Wraps *app*, which sees a `HEAD` as a `GET`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        seen = {**scope, "method": "GET"}  # a copy: from the scope, the server knows to leave the body away
        try:
            await self._app(seen, receive, send)
        finally:
            if "route" in seen:
                scope["route"] = seen["route"]


def with_head(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the *headers* of an answer; an `Allow` that has `GET` has `HEAD` too."""
    allowed = {method.strip() for method in headers.get("Allow", "").split(",")}
    return {**headers, "Allow": ", ".join(sorted(allowed | {"HEAD"}))} if "GET" in allowed else {**headers}
