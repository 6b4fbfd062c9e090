"""The headers of a request by name, sorted once."""

from collections.abc import Iterable

from starlette.types import Scope

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
