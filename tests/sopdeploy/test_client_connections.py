"""Which connections a client uses: in threads, after a fork, after Ctrl-C and after the server ended them."""

import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from sopdeploy import client_requests
from sopdeploy.client import Client
from sopdeploy.errors import ConfigError, UnreachableError
from tests.support.children import kills_itself
from tests.support.service import wait_for
from tests.support.stub_server import Gate, Received, StubServer, reply, stub_server

FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def named(request: Received) -> bytes:
    """The response whose class is the photograph, with the number of the connection as its digest."""
    body = json.dumps({"classes": [{"label": request.body.decode(), "probability": 1}]})
    return reply(body.encode(), "200 OK", f"X-Model-Digest: {request.connection}")


@pytest.fixture
def server() -> Iterator[StubServer]:
    with stub_server(named) as found:
        yield found


def connection_of(client: Client, photograph: str) -> str:
    """Classify *photograph*, check that the response is its own, and return the connection's number."""
    found = client.classify(photograph.encode())
    assert found.classes[0].label == photograph
    return found.model_digest


def in_fork(run: Callable[[], object]) -> None:
    """Run *run* in a forked process, which is killed if it waits for a lock that nothing releases."""

    def in_time() -> None:
        signal.alarm(60)
        run()

    assert not kills_itself(in_time)


@FORKS
def test_a_process_has_connections_of_its_own(server: StubServer) -> None:
    with Client(server.url, timeout=60) as client:
        assert connection_of(client, "parent") == connection_of(client, "again") == "0"

        def child() -> None:
            with client:
                assert (
                    connection_of(client, "child")
                    == connection_of(client, "child again")
                    == "1"
                )
                in_fork(lambda: connection_of(client, "grandchild"))
                assert connection_of(client, "child after") == "1"

        in_fork(child)
        assert connection_of(client, "after") == "0"  # the child has closed its own
    assert [request.connection for request in server.received] == [0, 0, 1, 1, 2, 1, 0]


@FORKS
def test_a_fork_during_a_request_leaves_no_lock_and_no_connection_to_the_child() -> None:
    gate = Gate(named, b"slow")

    with (
        stub_server(gate) as server,
        ThreadPoolExecutor(1) as threads,
        Client(server.url, timeout=60) as client,
    ):
        slow = threads.submit(connection_of, client, "slow")
        assert gate.asked.wait(60)
        with client._loop()._lock:

            def child() -> None:
                assert connection_of(client, "child") == "1"
                client.close()

            in_fork(child)
        gate.opened.set()
        assert slow.result() == connection_of(client, "after") == "0"


@FORKS
def test_threads_of_a_new_process_share_its_connections(server: StubServer) -> None:
    client = Client(server.url, timeout=60)
    connection_of(client, "parent")

    def child() -> None:
        start, loops = threading.Barrier(4), []

        def ask(number: int) -> None:
            start.wait(60)
            loops.append(client._loop())
            connection_of(client, f"thread {number}")

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(ask, range(4)))
        assert len(set(map(id, loops))) == 1

    in_fork(child)
    client.close()


@FORKS
def test_a_process_made_by_fork_ends_although_the_parent_was_sending_a_request(
    server: StubServer,
) -> None:
    with Client(server.url, timeout=60) as client:
        assert connection_of(client, "parent") == "0"

        # Another thread may hold the lock at the fork, and nothing releases it in the child.
        of_parent = client._loop()
        with of_parent._lock:
            in_fork(of_parent.end)  # as the finalizer of the client does
        assert connection_of(client, "after") == "0"


@FORKS
def test_a_transport_of_the_user_works_in_one_process() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"classes": []}))
    with Client("http://server", transport=transport) as client:
        client.classify(b"x")

        def child() -> None:
            with pytest.raises(ConfigError, match="one process"):
                client.classify(b"x")

        in_fork(child)


def test_a_response_that_breaks_off_is_not_requested_again() -> None:
    cut = reply(b'{"classes":[]}', "200 OK", "Connection: close")[:-1]
    with stub_server(lambda _: cut) as server, Client(server.url, timeout=60) as client:
        with pytest.raises(UnreachableError, match="status 200, but the response breaks off"):
            client.classify(b"x")
        assert len(server.received) == 1


def threads_of_clients() -> int:
    return sum(thread.name == "sopdeploy client" for thread in threading.enumerate())


@pytest.mark.parametrize("is_closed", [True, False])
def test_the_thread_of_a_client_ends_with_it(server: StubServer, is_closed: bool) -> None:
    before = threads_of_clients()
    client = Client(server.url, timeout=60)
    connection_of(client, "first")
    assert threads_of_clients() == before + 1

    if is_closed:
        client.close()
    del client

    wait_for(lambda: threads_of_clients() == before)


def test_close_ends_the_calls_of_other_threads() -> None:
    gate = Gate(named, b"slow")

    with stub_server(gate) as server, ThreadPoolExecutor(1) as threads:
        client = Client(server.url, timeout=60)
        slow = threads.submit(connection_of, client, "slow")
        assert gate.asked.wait(60)

        client.close()

        with pytest.raises(ConfigError, match="the client is closed"):
            slow.result(60)
        gate.opened.set()


@pytest.mark.usefixtures("client_kind")
def test_a_connection_that_was_idle_for_long_is_not_used_again(
    server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = httpx.Limits(keepalive_expiry=0.0)

    with Client(server.url, timeout=60) as client:
        assert connection_of(client, "first") == connection_of(client, "second") == "0"

    monkeypatch.setattr(client_requests, "LIMITS", limits)
    with Client(server.url, timeout=60) as client:
        assert connection_of(client, "third") == "1"
        assert connection_of(client, "fourth") == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other options")
def test_a_connection_to_a_machine_that_is_lost_breaks_after_some_seconds(
    server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []
    send = httpx.AsyncHTTPTransport.handle_async_request

    async def note(
        transport: httpx.AsyncHTTPTransport, request: httpx.Request
    ) -> httpx.Response:
        response = await send(transport, request)
        used = response.extensions["network_stream"].get_extra_info("socket")
        options = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
        times.extend(used.getsockopt(socket.IPPROTO_TCP, option) for option in options)
        assert used.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return response

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", note)
    with Client(server.url, timeout=60) as client:
        connection_of(client, "photograph")
    assert times == [10_000, 5, 5]


class Blocking(httpx.BaseTransport):
    """A transport of a user for blocking programs."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return httpx.Response(200, json={"classes": [], "warnings": [request.content.decode()]})


def test_a_blocking_transport_of_the_user_is_used() -> None:
    with Client("http://server", transport=Blocking()) as client:
        assert client.classify(b"x").warnings == ("x",)
