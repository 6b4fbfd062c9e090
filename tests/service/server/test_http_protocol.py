"""Connection limits on real sockets: slow, large and malformed requests."""

import itertools
import math
import re
import resource
import socket
import time
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sopdeploy.errors import ConfigError
from sopdeploy_service.api import admission
from sopdeploy_service.http.middleware import PROBES
from sopdeploy_service.server import connections, http_protocol
from sopdeploy_service.server.http_protocol import LINGER_SECONDS, LimitedHttpProtocol
from sopdeploy_service.server.sockets import raise_file_limit
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.raw import EXPECT, GET, POST, Reply, connect, count, post_of, read
from tests.support.service import running, wait_for
from tests.support.strategies import damaged

SHORT = (
    (http_protocol, "HEADER_SECONDS"),
    (http_protocol, "WRITE_SECONDS"),
    (http_protocol, "KEEP_ALIVE_SECONDS"),
    (admission, "BODY_GRACE_SECONDS"),
)


@pytest.fixture(scope="module")
def client(bundle):
    with running(
        FakeRuntime(num_classes=7), bundle, Settings(max_body_bytes=1_000_000)
    ) as client:
        yield client


@pytest.fixture
def impatient(bundle, monkeypatch):
    """A client of a server with short timeouts, which requests of a paused process would also exceed."""
    for module, name in SHORT:
        monkeypatch.setattr(module, name, 1)
    with running(FakeRuntime(num_classes=7), bundle, Settings()) as client:
        yield client


@pytest.fixture
def wire(client):
    """`wire()` opens a connection to the server of this module, `wire(other)` to another one."""
    with ExitStack() as stack:
        yield lambda server=client: stack.enter_context(connect(server))


def get(wire: socket.socket) -> None:
    wire.sendall(GET + b"\r\n")
    assert read(wire, to_the_end=False).status == 200


LARGE = b"".join(b"X-%d: 1\r\n" % number for number in range(1000))
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

REJECTED = {
    (431, "headers_too_large"): {
        "a header of 100 kB": GET + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
        "an endless header": GET + b"X: " + b"x" * 1_000_000,
        "1000 headers": GET + LARGE + b"\r\n",
        "an endless chunk extension": CHUNKED + b"3;a=" + b"x" * 600_000,
        "endless zeros before a chunk size": CHUNKED + b"0" * 600_000,
        "many trailers": CHUNKED + b"0\r\n" + LARGE,
        "many blank lines": b"\r\n" * 100_000,
    },
    (501, "unknown_transfer_coding"): {
        f"the transfer coding {value}": POST
        + b"Transfer-Encoding: "
        + value
        + b"\r\n\r\n0\r\n\r\n"
        for value in (
            b"gzip",
            b"chunked;a=b",
            b"gzip, chunked",
            b"x\r\nTransfer-Encoding: chunked",
        )
    },
    (414, "url_too_long"): {
        "a URL of 64 kB": b"GET /" + b"x" * 65_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    },
    (413, "too_large"): {
        "a length of 1 TB": POST + b"Content-Length: 1000000000000\r\n\r\n",
        "a length one over, on a GET": GET + b"Content-Length: 1000001\r\n\r\n",
    },
    (400, "malformed_request"): {
        "a length over 64 bits": POST + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n",
        "a negative length": POST + b"Content-Length: -1\r\n\r\n",
        "a length and chunks": POST
        + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        **{
            f"the transfer coding {value}": POST
            + b"Transfer-Encoding: "
            + value
            + b"\r\n\r\n0\r\n\r\n"
            for value in (
                b"chunked, gzip",
                b"chunked, chunked",
                b"",
                b"chunked\r\ntransfer-encoding: identity",
                b"chunked\x00",
            )
        },
        "a space after Transfer-Encoding": POST
        + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "chunks and a length": POST
        + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "chunks and no length": POST
        + b"transfer-encoding: CHUNKED\r\nContent-Length: 0\r\n\r\n0\r\n\r\n",
        "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "a hexadecimal length": POST + b"Content-Length: 0x5\r\n\r\nhello",
        "a chunk size over 64 bits": CHUNKED + b"1" + b"0" * 16 + b"\r\na",
        "a chunk longer than its size": CHUNKED + b"1\r\nab\r\n0\r\n\r\n",
        "a chunk without a size": CHUNKED + b"hello\r\n",
        "a space in a header's name": GET + b"A b: c\r\n\r\n",
        "a zero byte in a header": GET + b"A: b\0c\r\n\r\n",
        "an invalid URL": b"GET livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "a URL with a broken host": b"GET http://[::1/a HTTP/1.1\r\n\r\n",
        "no host": b"GET /livez HTTP/1.1\r\n\r\n",
        "two hosts": GET + b"Host: y\r\n\r\n",
        "a tunnel": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    },
}


@pytest.mark.parametrize(
    ("status", "code", "sent"),
    [
        pytest.param(status, code, sent, id=name)
        for (status, code), cases in REJECTED.items()
        for name, sent in cases.items()
    ],
)
def test_an_invalid_request_is_rejected_without_waiting_for_the_rest(
    client, wire, jpeg, status, code, sent
):
    before = count(client, f'rejected_total{{reason="{code}"}}')
    bad = wire()
    bad.sendall(sent)
    reply = read(bad)

    assert (reply.status, reply.code) == (status, code)
    assert reply.headers["content-type"] == "application/problem+json"
    assert len(reply.headers["x-request-id"]) == 32
    assert count(client, f'rejected_total{{reason="{code}"}}') == before + 1
    assert client.post("/v1/classify", content=jpeg).status_code == 200


INCOMPLETE = {
    "incomplete headers": (GET, "slow_request"),
    "one byte": (b"G", "slow_request"),
    "a body that stops": (
        POST + b"Content-Length: 1000\r\n\r\n" + b"\xff\xd8\xff",
        "slow_body",
    ),
    "a body that never starts": (POST + b"Content-Length: 1000\r\n\r\n", "slow_body"),
    "a body without its end": (
        POST + b"Content-Length: 900000\r\n\r\n" + bytes(899_999),
        "slow_body",
    ),
    "chunks that stop": (CHUNKED + b"3\r\nabc\r\n", "slow_body"),
    "an endless chunk extension": (CHUNKED + b"3;a=", "slow_body"),
}


@pytest.mark.slow
def test_incomplete_requests_are_rejected_after_their_time(impatient):
    started = time.monotonic()
    with ExitStack() as stack:
        found = {}
        wires = {name: stack.enter_context(connect(impatient)) for name in INCOMPLETE}
        for name, wire in wires.items():
            wire.sendall(INCOMPLETE[name][0])

        for name, wire in wires.items():
            reply = read(wire)
            assert reply.status == 408
            assert time.monotonic() > started + 1
            found[name] = reply.code

    assert found == {name: code for name, (_, code) in INCOMPLETE.items()}


@pytest.mark.parametrize(
    ("start", "code"),
    [(GET + b"X: ", b"slow_request"), (POST + b"Content-Length: 900000\r\n\r\n", b"slow_body")],
)
def test_slow_bytes_do_not_extend_the_timeout(impatient, start, code):
    data = b""
    with connect(impatient) as bad:
        bad.sendall(start)
        bad.settimeout(0.05)
        while not data:
            bad.sendall(b"a")
            with suppress(TimeoutError):
                data = bad.recv(65_536)

    assert data.startswith(b"HTTP/1.1 408")
    assert code in data


def test_the_time_for_the_answer_begins_when_the_body_has_arrived(serve_with, jpeg):
    client = serve_with(FakeRuntime(num_classes=7), request_timeout=1.5)
    request = post_of(jpeg)
    half = len(jpeg) // 2
    with connect(client) as slow:
        slow.sendall(request[:-half])
        time.sleep(1.6)
        slow.sendall(request[-half:])
        reply = read(slow, to_the_end=False)

    assert reply.status == 200


def test_a_silent_or_idle_connection_is_closed_after_its_time(impatient):
    started = time.monotonic()
    with connect(impatient) as quiet, connect(impatient) as blank, connect(impatient) as idle:
        blank.sendall(b"\r\n\r\n")
        get(idle)
        assert [wire.recv(10) for wire in (quiet, blank, idle)] == [b""] * 3

    assert time.monotonic() > started + 1


ANSWERED = 'requests_total{code="200",model="",reason="",route="/openapi.json"}'
SLOW_READERS = 'rejected_total{reason="slow_reader"}'


def test_a_client_that_does_not_read_is_disconnected_after_its_own_time(bundle, monkeypatch):
    monkeypatch.setattr(http_protocol, "WRITE_SECONDS", 1)
    requests = 0

    def is_disconnected() -> bool:
        nonlocal requests
        # A request before the end of the previous response would close the connection.
        if count(client, ANSWERED) == requests:
            bad.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            requests += 1
        return count(client, SLOW_READERS) == 1

    with (
        running(FakeRuntime(num_classes=7), bundle, Settings()) as client,
        connect(client) as bad,
    ):
        bad.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wait_for(is_disconnected, 60)


@pytest.mark.parametrize("following", [GET + b"\r\n", b"garbage", (GET + b"\r\n") * 5000])
def test_a_request_that_does_not_wait_is_ignored_and_closed(wire, jpeg, following):
    good = wire()
    good.sendall(post_of(jpeg) + following)
    reply = read(good)  # to the end

    assert (reply.status, reply.headers["connection"]) == (200, "close")


VALID_CODINGS = (b"chunked", b"CHUNKED", b"Chunked", b"\tchunked", b"chunked ")


def test_chunks_are_accepted_in_every_valid_spelling_and_size(wire, jpeg):
    pieces = [jpeg[start : start + 50] for start in range(0, len(jpeg), 50)]
    body = (
        b"".join(b"%x;name=value\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        + b"0\r\n\r\n"
    )
    good = wire()

    for coding in VALID_CODINGS:
        good.sendall(POST + b"Transfer-Encoding:" + coding + b"\r\n\r\n" + body)
        assert read(good, to_the_end=False).status == 200

    good.sendall(
        CHUNKED
        + body[:-5]
        + b"1\r\na\r\n" * 400
        + b"0\r\n\r\n"
        + b"\0garbage after the request"
    )

    assert read(good).status == 200


NOWHERE = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"


def test_an_early_response_keeps_the_connection_if_the_body_arrives(impatient):
    with connect(impatient) as good, connect(impatient) as bad:
        for wire in (good, bad):
            wire.sendall(NOWHERE)
            assert read(wire, to_the_end=False).status == 404
        good.sendall(b"hello" + GET + b"\r\n")
        assert read(good, to_the_end=False).status == 200
        assert bad.recv(10) == b""

    with connect(impatient) as bad:
        bad.sendall(CHUNKED.replace(b"/v1/classify", b"/nowhere"))
        assert read(bad, to_the_end=False).status == 404
        bad.sendall(b"no size\r\n")
        assert bad.recv(10) == b""

    # A request has one response.
    assert (
        count(
            impatient,
            'requests_total{code="400",model="",reason="malformed_request",route="other"}',
        )
        == 0
    )


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_pieces_of_a_body_after_its_response_get_limited_time(client, monkeypatch, header):
    waits = []
    start_timer = LimitedHttpProtocol._start_timer

    def note(protocol, seconds, callback):
        waits.append((seconds, getattr(callback, "__name__", "")))
        start_timer(protocol, seconds, callback)

    monkeypatch.setattr(LimitedHttpProtocol, "_start_timer", note)
    with connect(client) as slow:
        slow.sendall(NOWHERE.replace(b"\r\n\r\n", b"\r\n" + header + b"\r\n"))
        assert read(slow, to_the_end=False).status == 404
        wait_for(lambda: (LINGER_SECONDS, "abort") in waits)

        waits.clear()
        slow.sendall(b"he")
        wait_for(lambda: waits == [(LINGER_SECONDS, "abort")])

        # The rest has taken too long: the connection is closed at once.
        open_ones = client.app.state.connections.open
        protocol = list(open_ones)[-1]
        protocol._rest_until = 0.0
        slow.sendall(b"l")
        wait_for(lambda: protocol not in open_ones)


def test_an_invalid_rest_of_a_body_gets_no_further_time(client):
    with connect(client) as slow:
        slow.sendall(NOWHERE.partition(b"\r\n")[0] + b"\r\nHost: localhost\r\n")
        slow.sendall(b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel")
        assert read(slow, to_the_end=False).status == 404
        protocol = list(client.app.state.connections.open)[-1]
        wait_for(lambda: protocol._rest_until < math.inf)
        until = protocol._rest_until

        slow.sendall(b"loX")  # the chunk is longer than its size
        wait_for(lambda: protocol._closed)
        assert protocol._rest_until == until


def test_trailers_are_not_headers_of_the_request(wire):
    """A proxy that checks headers, such as keys, does not see those that come after the body."""
    good = wire()
    good.sendall(CHUNKED + b"0\r\nX-Request-ID: late\r\nX-Request-Timeout-Ms: no\r\n\r\n")
    reply = read(good, to_the_end=False)

    assert reply.code == "empty_body"
    assert reply.headers["x-request-id"] != "late"


UPGRADE = b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"


@pytest.mark.parametrize(
    ("chunked", "kept", "following"),
    [
        (False, 0, b""),
        (False, 100, b""),
        (True, 100, b"garbage"),
        (False, 0, GET + UPGRADE + b"\r\n"),
    ],
)
def test_a_request_that_offers_http_2_is_served_with_its_body(
    wire, jpeg, chunked, kept, following
):
    """Java's `HttpClient` and `curl --http2` offer it with every request to an http:// URL."""
    good = wire()
    length = b"Content-Length: %d" % len(jpeg)
    body = jpeg

    if chunked:
        length = b"Transfer-Encoding: chunked"
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(jpeg), jpeg)

    request = POST + UPGRADE + length + b"\r\n\r\n" + body
    end = len(request) - kept
    good.sendall(request[:end] + (b"" if kept else following))
    if kept:
        good.sendall(request[end:] + following)

    assert read(good).status == 200


EXPECTING = {
    413: (b"/v1/classify", b"Content-Length: 2000000\r\n"),
    415: (b"/v1/classify", b"Content-Length: 100\r\nContent-Encoding: gzip\r\n"),
    404: (b"/nowhere", b"Content-Length: 100\r\n"),
}


def test_expect_100_gets_100_continue_or_the_rejection_before_the_body(wire, jpeg):
    good = wire()
    good.sendall(POST + b"Content-Length: %d\r\n" % len(jpeg) + EXPECT + b"\r\n")
    assert good.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"

    good.sendall(jpeg)
    assert read(good, to_the_end=False).status == 200
    for status, (path, headers) in EXPECTING.items():
        bad = wire()
        bad.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % path + headers + EXPECT + b"\r\n"
        )
        assert read(bad, to_the_end=False).status == status


def test_a_client_that_ends_its_side_within_a_body_has_left(wire, jpeg):
    unfinished = wire()
    unfinished.sendall(post_of(jpeg)[:-1])
    unfinished.shutdown(socket.SHUT_WR)

    assert unfinished.recv(10) == b""


def test_http_1_0_has_no_interim_responses(wire, jpeg):
    old = wire()
    old.sendall(
        POST.replace(b"1.1", b"1.0") + EXPECT + b"Content-Length: %d\r\n\r\n" % len(jpeg)
    )
    old.sendall(jpeg)

    assert read(old).status == 200


@pytest.fixture
def crowded(serve_with):
    """A client of a server of four connections."""
    return serve_with(FakeRuntime(num_classes=7), max_connections=4)


def test_a_connection_over_the_limit_is_503(crowded, wire):
    client = crowded
    wires = [wire(client) for _ in range(4)]
    wires[0].sendall(NOWHERE)
    assert read(wires[0], to_the_end=False).status == 404

    for each, end_of_body in zip(wires, (b"hello", b"", b"", b""), strict=True):
        each.sendall(end_of_body + GET)
    reply = ask(wire(client))
    assert reply.status == 503
    assert reply.code == "too_many_connections"
    assert reply.headers["retry-after"] == "1"

    for each in wires:
        each.sendall(b"\r\n")
        assert read(each, to_the_end=False).status == 200
        each.close()
    wait_for(lambda: count(client, "connections") == 1)


def ask(wire: socket.socket, path: bytes = b"/info", *, to_the_end: bool = True) -> Reply:
    """Return the response to a request of *path* on *wire*."""
    wire.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
    return read(wire, to_the_end=to_the_end)


NO_BODY = POST + b"Content-Length: 400000\r\n\r\n"


def hold(client, wires, sent):
    """Send *sent* on *wires*, and wait until the server waits for the rest of all of them."""
    connections = client.app.state.connections
    for wire in wires:
        wire.sendall(sent)
    wait_for(lambda: sum(one._in_body for one in connections.open) >= len(wires))


@pytest.fixture
def full(crowded, wire):
    """A client of a server whose four connections send bodies, and these connections."""
    wires = [wire(crowded) for _ in range(4)]
    hold(crowded, wires, NO_BODY)
    return crowded, wires


def between_requests(wire, _served):
    get(wire)


def after_an_early_response(wire, served):
    wire.sendall(NOWHERE)
    assert read(wire, to_the_end=False).status == 404
    wire.sendall(b"hello")
    wait_for(lambda: len(served.idle) >= 1)


def in_the_headers(wire, served):
    wire.sendall(GET)
    wait_for(lambda: any(one._in_headers for one in served.open))


def in_a_body(wire, served):
    wire.sendall(NO_BODY)
    wait_for(lambda: any(one._in_body for one in served.open))


def silent(_wire, served):
    wait_for(lambda: len(served.open) >= 1)


# What a connection does, the seconds in which it is fresh, and whether it makes room
WAITING = {
    "between two requests": (between_requests, 60, True),
    "after an early response": (after_an_early_response, 60, True),
    "silent": (silent, 0, True),
    "silent, but fresh": (silent, 60, False),
    "in its headers": (in_the_headers, 0, False),
    "in a body": (in_a_body, 0, False),
}


@pytest.mark.parametrize("proxies", ["", "127.0.0.1"], ids=["clients", "a trusted proxy"])
@pytest.mark.parametrize(("wait", "fresh", "makes_room"), WAITING.values(), ids=WAITING)
def test_a_connection_without_a_request_makes_room_for_another(
    serve_with, wire, monkeypatch, wait, fresh, makes_room, proxies
):
    monkeypatch.setattr(connections, "FRESH_SECONDS", fresh)
    client = serve_with(
        FakeRuntime(num_classes=7), max_connections=1, trusted_proxies=proxies or ()
    )
    first = wire(client)
    wait(first, client.app.state.connections)
    reply = ask(wire(client), to_the_end=not makes_room)

    assert reply.status == (200 if makes_room else 503)
    first.settimeout(0.2)
    if makes_room:
        assert first.recv(10) == b""
    else:
        with pytest.raises(TimeoutError):
            first.recv(10)


def test_of_idle_connections_the_longest_idle_one_makes_room(crowded, wire):
    wires = [wire(crowded) for _ in range(4)]
    for each in (*wires, wires[0]):  # the first one is idle for a shorter time than the second
        get(each)
    get(wire(crowded))

    assert wires[1].recv(10) == b""
    for each in (wires[0], *wires[2:]):
        get(each)


@pytest.mark.parametrize("path", [*sorted(PROBES), "/metrics"])
def test_probes_and_metrics_are_answered_on_a_full_server(full, wire, monkeypatch, path):
    monkeypatch.setattr(connections, "SPARE", 2)
    client, wires = full
    for _ in range(5):
        assert ask(wire(client), path.encode()).status == 200
        assert ask(wire(client)).status == 503

    for each in wires:  # no other connection has made room
        each.sendall(bytes(400_000))
        assert read(each, to_the_end=False).status == 415


def test_a_refused_probe_is_not_one_of_a_number(full, wire):
    """Its path decides, and not what looks like it."""
    client, _ = full
    for path, status in {b"/livez?x=1": 200, b"/livez/": 503, b"/x/livez": 503}.items():
        assert ask(wire(client), path).status == status


def test_room_that_becomes_free_before_the_request_is_used(full, wire):
    client, wires = full
    late = wire(client)
    late.sendall(GET[:5])
    wait_for(lambda: client.app.state.connections.uncounted)
    wires[0].close()
    wait_for(lambda: len(client.app.state.connections.open) == 4)

    late.sendall(GET[5:] + b"\r\n")
    assert read(late, to_the_end=False).status == 200
    get(late)


@pytest.mark.parametrize(
    ("soft", "hard", "raised"), [(100, 692, 692), (10_000, 10_000, None), (100, -1, 4788)]
)
def test_the_limit_of_open_files_is_raised_for_the_connections(monkeypatch, soft, hard, raised):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, limits: calls.append(limits))
    raise_file_limit(500)

    assert calls == ([(raised, hard)] if raised else [])

    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (100, 691))
    with pytest.raises(ConfigError, match=r"max_connections 500: .*692 .* 691"):
        raise_file_limit(500)


VALID = (
    POST
    + b"Content-Type: image/jpeg\r\nContent-Length: 20\r\nX-Request-ID: a\r\n\r\n"
    + bytes(20)
)


@settings(max_examples=60)
@given(request=damaged(VALID), cuts=st.lists(st.integers(1, len(VALID)), max_size=3))
def test_any_bytes_get_a_response_or_a_closed_connection(
    client, request: bytes, cuts: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch, connect(client) as wire:
        patch.setattr(http_protocol, "HEADER_SECONDS", 0.05)
        patch.setattr(admission, "BODY_GRACE_SECONDS", 0.05)
        for start, end in itertools.pairwise([0, *sorted(cuts), len(request)]):
            with suppress(ConnectionError):
                wire.sendall(request[start:end])
        try:
            reply = wire.recv(65_536)
        except ConnectionError:
            reply = b""

    assert re.match(rb"HTTP/1\.1 [24]\d\d ", reply) or not reply
    assert client.get("/livez").status_code == 200


def test_every_connection_over_the_limit_has_a_response(full, wire, monkeypatch):
    monkeypatch.setattr(connections, "SPARE", 2)
    client, _ = full
    for _ in range(6):
        reply = ask(wire(client))
        assert (reply.status, reply.code) == (503, "too_many_connections")
        assert len(client.app.state.connections.uncounted) <= 2


def test_a_silent_connection_of_a_trusted_proxy_is_kept(serve_with, wire, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.05)
    monkeypatch.setattr(http_protocol, "KEEP_ALIVE_SECONDS", 0.1)
    client = serve_with(FakeRuntime(num_classes=7), trusted_proxies="127.0.0.1")
    early = wire(client)
    time.sleep(0.3)  # longer than the headers may take, and than others may be idle
    get(early)
