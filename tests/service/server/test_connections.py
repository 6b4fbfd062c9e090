"""Which connections count, and which one makes room, without sockets; and those in a handshake."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from uvicorn.server import ServerState

from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server import connections
from sopdeploy_service.server.connections import FRESH_SECONDS, FULL, Connections
from sopdeploy_service.server.http_protocol import LimitedHttpProtocol, limited_config
from sopdeploy_service.settings import Settings
from tests.service.server.test_parser_limits import never


@dataclass(eq=False)
class FakeConnection:
    """A connection that notes how it ended; *clock* has the time."""

    clock: SimpleNamespace
    ended: str = ""
    quiet: bool = True
    loop: Any = field(init=False)

    def __post_init__(self) -> None:
        self.loop = SimpleNamespace(time=lambda: self.clock.now)

    def is_quiet(self) -> bool:
        return self.quiet

    def close_after_response(self) -> None: ...

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


class Server:
    """*limit* connections, that each have had a request and are idle."""

    def __init__(self, limit: int) -> None:
        self.clock = SimpleNamespace(now=0.0)
        self.shared = Connections(Settings(max_connections=limit), Metrics())
        self.first = [self.add() for _ in range(limit)]
        for one in self.first:
            self.shared.note_request(one)
            self.shared.note_idle(one)

    def add(self) -> FakeConnection:
        one = FakeConnection(self.clock)
        self.shared.admit(one)
        return one

    def ask(self, one: FakeConnection, path: str = "/info") -> Any:
        self.shared.note_request(one)
        return self.shared.admit_request(one, path)


def test_a_request_that_was_sent_before_its_connection_closes_is_not_lost() -> None:
    server = Server(2)
    server.first[0].quiet = False  # its request is in the socket
    assert server.ask(server.add()) is None
    assert [one.ended for one in server.first] == ["", "closed"]

    # All others have a request, or will have one in this turn of the loop.
    new = server.add()
    assert server.ask(new) is FULL
    assert server.first[0].ended == ""


@pytest.mark.parametrize(
    ("seconds", "answer"), [(FRESH_SECONDS - 0.01, FULL), (FRESH_SECONDS, None)]
)
def test_a_new_connection_has_time_for_its_request(seconds: float, answer: Any) -> None:
    server = Server(1)
    server.shared.remove(server.first[0])
    silent = server.add()
    server.clock.now += seconds

    assert server.ask(server.add()) is answer
    assert silent.ended == ("" if answer else "closed")


def test_connections_over_the_limit_are_few_and_probes_are_not_among_those_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "SPARE", 3)
    server = Server(1)
    server.ask(server.first[0])
    shared = server.shared

    # Metrics that take their time: as many as `SPARE`, and any number of probes.
    reading = [server.add() for _ in range(3)]
    assert [server.ask(one, "/metrics") for one in reading] == [None] * 3
    assert server.ask(server.add(), "/metrics") is FULL
    assert [server.ask(server.add(), "/livez") for _ in range(10)] == [None] * 10
    assert shared.is_over_limit()

    # Of those that say nothing, the earliest are aborted, and none of the others.
    silent = [server.add() for _ in range(6)]
    assert [one.ended for one in silent] == ["aborted"] * 3 + [""] * 3
    assert not any(one.ended for one in (*server.first, *reading))

    # The end of one that does not count makes no room.
    server.clock.now += 2 * FRESH_SECONDS
    assert server.ask(server.add()) is FULL
    assert [one.ended for one in silent] == ["aborted"] * 4 + [""] * 2

    # Each that ends leaves nothing behind.
    for one in list(shared.open):
        shared.remove(one)
    assert not shared.open
    assert not shared.idle
    assert not shared.uncounted
    assert not shared.is_over_limit()


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_handshakes_that_never_begin_count_and_make_room(
    monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    monkeypatch.setattr(connections, "SPARE", 2)
    shared = Connections(
        Settings(max_connections=3), Metrics(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    )
    config = limited_config(never, shared)
    config.lifespan = "off"

    async def scenario() -> list[bool]:
        clients: list[socket.socket] = []
        tasks = set()

        async def connect() -> None:
            theirs, ours = socket.socketpair()
            theirs.setblocking(False)
            ours.setblocking(False)
            clients.append(theirs)
            protocol = LimitedHttpProtocol(
                shared, config=config, server_state=ServerState(), app_state={}
            )
            tasks.add(asyncio.create_task(protocol.shake_hands(ours, shared.tls)))
            for _ in range(5):
                await asyncio.sleep(0)

        # Three count, two wait, and the first of those that wait leave for others.
        for _ in range(8):
            await connect()
        assert len(shared.open) == 5
        assert len(shared.uncounted) == 2
        await asyncio.sleep(0.05)
        ended = [is_closed(one) for one in clients]

        # Those that are no longer fresh make room.
        monkeypatch.setattr(connections, "FRESH_SECONDS", 60)
        for one in shared.idle:
            shared.idle[one] = 0.0
        await connect()
        assert len(shared.open) - len(shared.uncounted) == 3
        await asyncio.sleep(0.05)
        assert is_closed(clients[0])

        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert all(map(is_closed, clients))
        assert not shared.open
        for one in clients:
            one.close()
        return ended

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        assert runner.run(scenario()) == [False] * 3 + [True] * 3 + [False] * 2


def is_closed(client: socket.socket) -> bool:
    """Tell whether the server has closed the connection of *client*."""
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
