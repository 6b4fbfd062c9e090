"""One header of a request, found without reading the others."""

from collections.abc import Iterable

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the value of the header *name*, in lower case; of several the first, or None."""
    return find(scope["headers"], name)


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the value of *name* in raw *headers*, as `header` does."""
    for found, value in headers:
        if found == name:
            return value
    return None


def text(scope: Scope, name: bytes) -> str:
    """Return the value of the header *name* as text, empty where there is none."""
    value = find(scope["headers"], name)
    return "" if value is None else value.decode("latin-1")
