"""Listening sockets and the limit of open files."""

import contextlib
import resource
import socket

from sopdeploy.errors import ConfigError

SPARE = 64  # connections over the limit that get a 503 response; further ones are aborted
MAX_PENDING = 4096  # connections that are not accepted yet; the Linux default
OTHER_FILES = 64  # bundles, libraries
# Bytes of a connection that wait in the kernel, beside those on the way; its default is megabytes.
UNSENT_BYTES = 131_072


def raise_file_limit(num_connections: int) -> None:
    """Raise the limit of open files for *num_connections*; raises `ConfigError` if this is not possible."""
    needed_files = num_connections + SPARE + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    if hard != resource.RLIM_INFINITY and hard < needed_files:
        raise ConfigError(
            f"max_connections {num_connections}: needs {needed_files} open files, but the system allows {hard}; "
            "lower max_connections or raise `ulimit -n`"
        )

    if soft != resource.RLIM_INFINITY and soft < needed_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed_files, hard))


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to *host* and *port* (0: any free one) without listening; raises `ConfigError`."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)

        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections inherit this. A response that nobody reads then costs no memory and no
            # copy.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as problem:  # UnicodeError: not a host name, such as `a..b`
        reason = getattr(problem, "strerror", "not a host name")
        raise ConfigError(
            f"{host}:{port}: cannot listen ({reason}); choose another host or port"
        ) from problem

    return listener


def accept_pending(listener: socket.socket) -> list[socket.socket]:
    """Accept all pending connections of the non-blocking *listener*.

    Call it before closing the listener: the kernel resets the connections that are not accepted
    by then.
    """
    accepted: list[socket.socket] = []
    with contextlib.suppress(OSError):  # no pending connection is left, or no file descriptor
        while len(accepted) < MAX_PENDING:
            accepted.append(listener.accept()[0])
    return accepted


def url(listener: socket.socket) -> str:
    """Format the URL of the bound *listener*."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
