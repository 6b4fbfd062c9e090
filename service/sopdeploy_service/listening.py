"""Sockets that a server listens on."""

import socket

from sopdeploy.errors import ConfigError


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


def url(listener: socket.socket) -> str:
    """Return the URL of a bound *listener*."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
