"""Listening sockets, and the connections that wait at them."""

import asyncio
import errno
import os
import socket
from contextlib import ExitStack, suppress

import pytest

from sopdeploy_service.server import sockets
from sopdeploy_service.server.http_protocol import without_mapping
from sopdeploy_service.server.sockets import UNSENT_BYTES, Arrivals, bind


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_without_a_free_file_a_port_pauses(monkeypatch, number: int) -> None:
    monkeypatch.setattr(sockets, "FILE_SECONDS", 0)
    failures = [OSError(number, os.strerror(number))]

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return super().accept()

    async def serve() -> None:
        arrived = asyncio.Event()
        with Listener() as listener:
            listener.bind(("127.0.0.1", 0))
            arrivals = Arrivals(listener, lambda: arrived.set() if arrivals else None)
            arrivals.open()
            with socket.create_connection(listener.getsockname()):
                await asyncio.wait_for(arrived.wait(), 60)
                arrivals.take().close()
            assert len(arrivals) == 0
            assert failures == []

    asyncio.run(serve())


def test_of_too_many_connections_that_wait_the_oldest_is_closed(monkeypatch) -> None:
    monkeypatch.setattr(sockets, "MAX_PENDING", 2)

    async def serve() -> None:
        waiting = asyncio.Semaphore(0)
        with ExitStack() as stack:
            listener = stack.enter_context(bind("127.0.0.1", 0))
            arrivals = Arrivals(listener, waiting.release)
            arrivals.open()
            clients = []
            for _ in range(3):
                client = socket.create_connection(listener.getsockname(), timeout=60)
                clients.append(stack.enter_context(client))
                await asyncio.wait_for(waiting.acquire(), 60)
            assert (clients[0].recv(1), len(arrivals)) == (b"", 2)
            for connection in arrivals.close():
                connection.close()

    asyncio.run(serve())


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
