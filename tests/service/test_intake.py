"""Uploads share a bounded room; who finds none is told so, and what was held is given back."""

import time
from contextlib import ExitStack

from sopdeploy_service.runtime.pretend import PretendRuntime
from tests.service.raw import EXPECT, POST, connect, count, read


def test_a_slow_and_large_crowd_leaves_room_for_small_images(serve_with, jpeg, until):
    client = serve_with(
        PretendRuntime(classes=7), max_body_bytes=2_000_000, max_upload_bytes=8_000_000, body_grace_seconds=60
    )
    codes = []
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(client)) for _ in range(12)]
        for wire in crowd:
            wire.sendall(POST + b"Content-Length: 1900000\r\n\r\n")
        for _ in range(18):
            for wire in list(crowd):
                try:
                    wire.sendall(bytes(100_000))
                except OSError:
                    crowd.remove(wire)
            assert count(client, "upload_bytes") <= 7_000_000
            assert client.post("/v1/classify", content=jpeg).status_code == 200
        for wire in crowd:
            wire.settimeout(0.2)
            try:
                codes.append(read(wire, to_the_end=False).code)
            except TimeoutError:
                codes.append("waiting")
    assert 2 <= codes.count("waiting") <= 4
    assert count(client, 'rejected_total{reason="uploads_full"}') >= 8
    until(lambda: count(client, "upload_bytes") == 0)


def test_an_upload_that_finds_no_room_is_429_before_it_is_sent(serve_with):
    client = serve_with(
        PretendRuntime(classes=7), max_body_bytes=2_000_000, max_upload_bytes=2_300_000, body_grace_seconds=60
    )
    with connect(client) as first, connect(client) as second:
        first.sendall(POST + b"Content-Length: 1900000\r\n\r\n" + bytes(1_800_000))
        while count(client, "upload_bytes") < 1_800_000:
            time.sleep(0.01)
        second.sendall(POST + b"Content-Length: 1900000\r\n" + EXPECT + b"\r\n")
        reply = read(second, to_the_end=False)
    assert (reply.status, reply.code, reply.headers["retry-after"]) == (429, "uploads_full", "2")
