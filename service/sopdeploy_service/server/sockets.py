"""Listening sockets, the order in which their connections are served, and the limit of open files."""

import asyncio
import contextlib
import resource
import socket
from collections import deque
from collections.abc import Callable

from sopdeploy.errors import ConfigError

SPARE = 64  # connections over the limit that get a 503 response; further ones are aborted
MAX_PENDING = 4096  # connections that nobody serves yet; the Linux default
ACCEPTED_AT_ONCE = 64  # so that other events are handled in between
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
    needed_files = num_connections + SPARE + OTHER_FILES
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


class Arrivals:
    """The connections of *listener* that nobody serves yet; the addresses that they come from take turns.

    The system has one queue. In it, an address that opens connections faster than they are
    served lets all others wait, probes too; here it lets its own wait. *on_arrival* is called
    after some were accepted.
    """

    def __init__(self, listener: socket.socket, on_arrival: Callable[[], None]) -> None:
        self._listener = listener
        self._on_arrival = on_arrival
        self._num_waiting = 0
        # By address; the first one has the next turn. No queue is empty.
        self._queues: dict[str, deque[socket.socket]] = {}

    def __len__(self) -> int:
        return self._num_waiting

    def open(self) -> None:
        """Listen, and accept connections on the running event loop; raises `OSError`."""
        self._listener.setblocking(False)
        self._listener.listen(MAX_PENDING)
        self._resume()

    def _resume(self) -> None:
        if self._listener.fileno() != -1:  # it was not closed
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            self.accept(ACCEPTED_AT_ONCE)
        except OSError:  # no free file: further ones wait in the system's queue
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(FILE_SECONDS, self._resume)
        self._on_arrival()

    def accept(self, limit: int) -> None:
        """Accept up to *limit* pending connections.

        Of more than `MAX_PENDING` that wait, the oldest one of the address with most of them is
        closed. Raises `OSError` without a free file.
        """
        for _ in range(limit):
            try:
                connection, address = self._listener.accept()
            except BlockingIOError:  # no pending connection is left
                return
            except ConnectionError:  # this client has gone
                continue

            self._queues.setdefault(str(address[0]), deque()).append(connection)
            self._num_waiting += 1
            if self._num_waiting > MAX_PENDING:
                self._take_of(max(self._queues, key=lambda one: len(self._queues[one]))).close()

    def take(self) -> socket.socket:
        """Take the oldest connection of the address whose turn it is; one must wait."""
        address = next(iter(self._queues))
        connection = self._take_of(address)

        # If it has further ones, its next turn comes after those of all others.
        if address in self._queues:
            self._queues[address] = self._queues.pop(address)
        return connection

    def close(self) -> list[socket.socket]:
        """Close the port; return all connections that wait, or that the system has accepted.

        The kernel would reset the latter.
        """
        asyncio.get_running_loop().remove_reader(self._listener)
        with contextlib.suppress(OSError):  # no free file
            self.accept(MAX_PENDING)
        self._listener.close()

        return [self.take() for _ in range(len(self))]

    def _take_of(self, address: str) -> socket.socket:
        connection = self._queues[address].popleft()
        self._num_waiting -= 1
        if not self._queues[address]:
            del self._queues[address]
        return connection


def url(listener: socket.socket, scheme: str = "http") -> str:
    """Format the URL of the bound *listener*."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
