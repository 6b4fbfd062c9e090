"""The order in which connections that wait are served, and what happens to too many."""

import asyncio
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace

import pytest

from sopdeploy_service.server import sockets
from sopdeploy_service.server.http_protocol import without_mapping
from sopdeploy_service.server.sockets import UNSENT_BYTES, Arrivals, bind


class Connection:
    """An accepted connection of an address."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_open = True

    def setblocking(self, is_blocking: bool) -> None:
        assert not is_blocking

    def close(self) -> None:
        self.is_open = False


def listener_with(events: Sequence[Connection | OSError]) -> SimpleNamespace:
    """Create a listener that accepts the connections among *events*, from the address before `-`, in turn."""
    remaining: Iterator[Connection | OSError] = iter(events)

    def accept() -> tuple[Connection, tuple[str, int]]:
        event = next(remaining, BlockingIOError())
        if isinstance(event, OSError):
            raise event
        return event, (event.name.partition("-")[0], 0)

    return SimpleNamespace(accept=accept)


def names(arrivals: Arrivals) -> list[str]:
    """Take all connections; return their names."""
    return [arrivals.take().name for _ in range(len(arrivals))]


@pytest.mark.parametrize(
    ("arrived", "served"),
    [
        ("", ""),
        ("a-1 a-2 a-3", "a-1 a-2 a-3"),
        ("a-1 a-2 a-3 a-4 b-1", "a-1 b-1 a-2 a-3 a-4"),
        ("a-1 a-2 b-1 b-2 c-1", "a-1 b-1 c-1 a-2 b-2"),
    ],
)
def test_the_addresses_of_connections_take_turns(arrived: str, served: str) -> None:
    arrivals = Arrivals(listener_with([Connection(name) for name in arrived.split()]), print)
    arrivals.accept(100)
    assert len(arrivals) == len(arrived.split())
    assert names(arrivals) == served.split()
    assert len(arrivals) == 0


def test_a_later_connection_of_another_address_comes_next_but_one() -> None:
    arrived = [Connection(name) for name in ("a-1", "a-2", "a-3", "b-1")]
    arrivals = Arrivals(listener_with(arrived), print)
    arrivals.accept(3)

    assert arrivals.take().name == "a-1"
    arrivals.accept(1)
    assert names(arrivals) == ["a-2", "b-1", "a-3"]


def test_of_too_many_the_oldest_of_the_busiest_address_is_closed(monkeypatch) -> None:
    monkeypatch.setattr(sockets, "MAX_PENDING", 3)
    arrived = [Connection(name) for name in ("b-1", "a-1", "a-2", "a-3", "c-1")]
    arrivals = Arrivals(listener_with(arrived), print)
    arrivals.accept(100)
    assert [one.name for one in arrived if not one.is_open] == ["a-1", "a-2"]
    assert names(arrivals) == ["b-1", "a-3", "c-1"]


def test_a_client_that_has_gone_does_not_end_the_others() -> None:
    arrived = [Connection("a-1"), ConnectionAbortedError(), Connection("b-1")]
    arrivals = Arrivals(listener_with(arrived), print)
    arrivals.accept(100)
    assert names(arrivals) == ["a-1", "b-1"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_without_a_free_file_the_port_pauses_and_what_was_accepted_is_served(
    monkeypatch, number: int
) -> None:
    monkeypatch.setattr(sockets, "FILE_SECONDS", 0)
    calls: list[str] = []

    async def accept() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            arrivals = Arrivals(listener, lambda: calls.append("arrival"))
            arrivals.open()

            loop = asyncio.get_running_loop()
            monkeypatch.setattr(loop, "remove_reader", lambda _: calls.append("pause"))
            monkeypatch.setattr(loop, "add_reader", lambda *_: calls.append("resume"))
            fake = listener_with([Connection("a-1"), OSError(number, os.strerror(number))])
            fake.fileno = lambda: 1
            arrivals._listener = fake
            arrivals._accept()
            await asyncio.sleep(0.01)
            assert names(arrivals) == ["a-1"]

    asyncio.run(accept())
    assert calls == ["pause", "arrival", "resume"]


def test_a_port_that_closes_hands_over_all_that_the_system_has_accepted() -> None:
    async def close() -> list[bytes]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            arrivals = Arrivals(listener, print)
            arrivals.open()
            clients = [socket.create_connection(listener.getsockname()) for _ in range(3)]
            for number, client in enumerate(clients):
                client.sendall(b"%d" % number)
            arrived = arrivals.close()
            assert listener.fileno() == -1
            received = []
            for connection, client in zip(arrived, clients, strict=True):
                with connection, client:
                    received.append(connection.recv(1))
            return received

    assert asyncio.run(close()) == [b"0", b"1", b"2"]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
@pytest.mark.parametrize("host", ["*", "::"])
@pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
def test_every_address_is_one_of_ipv4_and_of_ipv6(host: str, client: str) -> None:
    with bind(host, 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]

        with socket.create_connection((client, port), timeout=60):
            accepted, address = listener.accept()
            accepted.close()

    assert without_mapping(address[0]) == client


def test_every_address_is_one_of_ipv4_where_there_is_no_ipv6(monkeypatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with bind("*", 0) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"  # noqa: S104 - bound for an instant


def test_the_kernel_takes_little_for_a_client_that_does_not_read():
    with bind("127.0.0.1", 0) as listener, socket.socket() as bad:
        listener.listen()
        bad.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bad.connect(listener.getsockname())
        with listener.accept()[0] as accepted:
            accepted.setblocking(False)
            taken = 0
            with suppress(BlockingIOError):
                while True:
                    taken += accepted.send(bytes(4096))
    assert taken < 2 * UNSENT_BYTES
