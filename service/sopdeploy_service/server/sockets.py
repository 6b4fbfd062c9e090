"""Listening sockets, the connections that wait at them, and the limit of open files."""

import asyncio
import resource
import socket
import sys
from collections import deque
from collections.abc import Callable

from sopdeploy.errors import ConfigError

# Connections over the limit that get a 503 response; further ones are aborted. As many may read the metrics.
SPARE = 64
MAX_PENDING = 4096  # connections that nobody serves yet; the Linux default
FILE_SECONDS = 0.1  # without a free file for a connection, until the next attempt
OTHER_FILES = 64  # bundles, libraries
# Hosts that stand for every address
ANY_HOST = "*"
ANY_IPV6 = "::"
ANY_IPV4 = "0.0.0.0"  # noqa: S104 - chosen by the user
# Bytes of a connection that wait in the kernel, beside those on the way; its default is megabytes.
UNSENT_BYTES = 131_072


def raise_file_limit(num_connections: int) -> None:
    """Raise the limit of open files for *num_connections*, and if possible for `MAX_PENDING` that wait.

    Raises `ConfigError` if the system does not allow the former.
    """
    needed_files = num_connections + 2 * SPARE + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    if hard != resource.RLIM_INFINITY and hard < needed_files:
        raise ConfigError(
            f"max_connections {num_connections}: needs {needed_files} open files, but the system allows {hard}; "
            "lower max_connections or raise `ulimit -n`"
        )

    wanted_files = needed_files + MAX_PENDING
    if hard != resource.RLIM_INFINITY:
        wanted_files = min(wanted_files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted_files, hard))


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to *host* and *port* (0: any free one) without listening; raises `ConfigError`.

    The host `::` stands for every address of this machine, of IPv6 and IPv4. So does `*`, which
    works without IPv6 as well.
    """
    if host == ANY_HOST:
        host = ANY_IPV6 if socket.has_dualstack_ipv6() else ANY_IPV4

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)

        try:
            if host == ANY_IPV6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
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
    """Accept the connections that wait in the system's queue, before *listener* is closed.

    The system resets those that nobody accepts. Without a free file, the rest is left.
    """
    connections = []
    while True:
        try:
            connections.append(listener.accept()[0])
        except ConnectionError:  # this client has gone
            continue
        except OSError:  # no further one, or no free file
            return connections


class Arrivals:
    """The connections of *listener* that nobody serves yet; *on_arrival* is called after some were accepted."""

    def __init__(self, listener: socket.socket, on_arrival: Callable[[], None]) -> None:
        self._listener = listener
        self._on_arrival = on_arrival
        self._waiting: deque[socket.socket] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self) -> None:
        """Listen, and accept connections on the running event loop; raises `OSError`."""
        self._listener.setblocking(False)
        self._listener.listen(MAX_PENDING)
        self._resume()

    def take(self) -> socket.socket:
        """Take the connection that has waited longest; one must wait."""
        return self._waiting.popleft()

    def close(self) -> list[socket.socket]:
        """Close the port; return all connections that wait."""
        asyncio.get_running_loop().remove_reader(self._listener)
        pending = [*self._waiting, *accept_pending(self._listener)]
        self._waiting.clear()
        self._listener.close()
        return pending

    def _resume(self) -> None:
        if self._listener.fileno() != -1:  # it was not closed
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            self._waiting.append(self._listener.accept()[0])
        except (BlockingIOError, ConnectionError):  # this client has gone
            return
        except OSError:  # no free file: further ones wait in the system's queue
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(FILE_SECONDS, self._resume)
        if len(self) > MAX_PENDING:
            self.take().close()
        self._on_arrival()


def url(listener: socket.socket, scheme: str = "http") -> str:
    """Format the URL of the bound *listener*."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def announce(
    listener: socket.socket, scheme: str, bundles: str, num_front_ends: int = 0
) -> None:
    """Print where the server listens, what it serves, its pages, and the number of front ends if it has any.

    The first line begins with `ready:`.
    """
    address = url(listener, scheme)
    sys.stdout.write(f"ready: {address}  {bundles}\n")
    sys.stdout.write(f"web page: {address}/\n")
    sys.stdout.write(f"API docs: {address}/docs\n")
    if num_front_ends:
        sys.stdout.write(f"front ends: {num_front_ends}\n")
    sys.stdout.flush()
