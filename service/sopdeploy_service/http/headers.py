"""The headers of a request by name, sorted once."""

from collections.abc import Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

BY_NAME = "sopdeploy.headers"  # where a scope keeps them


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the value of the header *name*, in lower case; of several the first, or None."""
    known: dict[bytes, bytes] | None = scope.get(BY_NAME)
    if known is None:
        known = scope[BY_NAME] = dict(reversed(scope["headers"]))
    return known.get(name)


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the value of *name* in raw *headers*, as `header` does."""
    for found, value in headers:
        if found == name:
            return value
    return None


def text(scope: Scope, name: bytes) -> str:
    """Return the value of the header *name* as text, empty where there is none."""
    value = header(scope, name)
    return "" if value is None else value.decode("latin-1")


def right_host(headers: Iterable[tuple[bytes, bytes]], version: str) -> bool:
    """Say whether a request of HTTP *version* names its host as RFC 9112, 3.2 has it; no other version may.

    With two names a proxy in front could see another host than this server.
    """
    hosts = sum(name == b"host" for name, _ in headers)
    return hosts == 1 if version == "1.1" else version == "1.0" and hosts <= 1


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
