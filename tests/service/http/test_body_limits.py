"""Uploads share a bounded room; who finds none is told so, and what was held is given back."""

import asyncio
import time
from contextlib import ExitStack

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy_service.http.body_limits import Body, UploadBudget
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.fake import FakeRuntime
from sopdeploy_service.settings import Settings, load_settings
from tests.service.raw import EXPECT, POST, connect, count, read


def test_a_slow_and_large_crowd_leaves_room_for_small_images(serve_with, jpeg, until):
    client = serve_with(
        FakeRuntime(classes=7), max_body_bytes=2_000_000, max_upload_bytes=8_000_000, body_grace_seconds=60
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


def test_an_upload_that_finds_no_room_is_429_before_it_is_sent(serve_with, until):
    client = serve_with(
        FakeRuntime(classes=7), max_body_bytes=2_000_000, max_upload_bytes=2_300_000, body_grace_seconds=60
    )
    with connect(client) as first, connect(client) as second:
        first.sendall(POST + b"Content-Length: 1900000\r\n\r\n" + bytes(1_800_000))
        until(lambda: count(client, "upload_bytes") >= 1_800_000)
        second.sendall(POST + b"Content-Length: 1900000\r\n" + EXPECT + b"\r\n")
        reply = read(second, to_the_end=False)
    assert (reply.status, reply.code, reply.headers["retry-after"]) == (429, "uploads_full", "2")


def test_a_body_that_could_never_find_room_is_a_wrong_setting():
    with pytest.raises(ConfigError, match=r"max_body_bytes .* larger than 7/8 of max_upload_bytes"):
        load_settings(max_body_bytes=900, max_upload_bytes=1000)


def test_a_pause_of_the_server_is_not_held_against_the_client(serve_with, jpeg, until):
    client = serve_with(FakeRuntime(classes=7), body_grace_seconds=0.3)
    with connect(client) as wire:
        wire.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(jpeg) + jpeg[:100])
        until(lambda: count(client, "upload_bytes") == 100)
        client.loop.call_soon_threadsafe(time.sleep, 0.6)  # what blocks the loop is not the client
        wire.sendall(jpeg[100:])
        assert read(wire, to_the_end=False).status == 200


def test_what_came_while_the_loop_was_blocked_is_read_before_its_sender_is_called_slow():
    async def read() -> bytes:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[bytes] = asyncio.Queue()
        loop.call_later(0.01, time.sleep, 0.2)
        loop.call_later(0.11, loop.call_soon, pieces.put_nowait, b"x")  # due after the deadline of 0.1 s

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": await pieces.get(), "more_body": False}

        settings = Settings(body_grace_seconds=0.1)
        body = Body(receive, 1, UploadBudget(1000, Metrics()), settings)
        return (await body.receive())["body"]

    assert asyncio.run(read()) == b"x"
