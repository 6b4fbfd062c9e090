"""Sockets that a server listens on."""

import contextlib
import socket

from sopdeploy.errors import ConfigError

LONGEST_QUEUE = 4096  # of connections not accepted; Linux keeps no more unless it is told to


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to *host* and *port* that does not listen yet; port 0 is any free one.

    Raises `ConfigError` where the address does not exist here or is in use.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as problem:
        raise ConfigError(
            f"{host}:{port}: cannot listen ({problem.strerror}); choose another host or port"
        ) from problem
    return listener


def take_in(listener: socket.socket) -> list[socket.socket]:
    """Return the connections that wait at *listener*, which does not block.

    To be called before it is closed: the system completes a connection on its own, and resets those that
    nobody has accepted by then.
    """
    found: list[socket.socket] = []
    with contextlib.suppress(OSError):  # none is left, or no file can be opened any more
        while len(found) < LONGEST_QUEUE:
            found.append(listener.accept()[0])
    return found


def url(listener: socket.socket) -> str:
    """Return the URL of a bound *listener*."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
