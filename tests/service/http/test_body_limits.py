"""The memory budget and the rate limit of request bodies."""

from contextlib import ExitStack

import pytest
from fake_runtime import FakeRuntime

from sopdeploy.errors import ConfigError
from sopdeploy_service.settings import load_settings
from tests.service.raw import EXPECT, POST, connect, count, read


def test_many_slow_and_large_uploads_leave_budget_for_small_images(serve_with, jpeg, until):
    client = serve_with(
        FakeRuntime(num_classes=7),
        max_body_bytes=2_000_000,
        max_upload_bytes=8_000_000,
        body_grace_seconds=60,
    )
    codes = []
    with ExitStack() as stack:
        uploads = [stack.enter_context(connect(client)) for _ in range(12)]
        for wire in uploads:
            wire.sendall(POST + b"Content-Length: 1900000\r\n\r\n")
        for _ in range(9):
            for wire in list(uploads):
                try:
                    wire.sendall(bytes(200_000))
                except OSError:
                    uploads.remove(wire)
            assert count(client, "upload_bytes") <= 7_000_000
            assert client.post("/v1/classify", content=jpeg).status_code == 200
        until(lambda: count(client, 'rejected_total{reason="uploads_full"}') >= 8)
        for wire in uploads:
            wire.settimeout(1)
            try:
                codes.append(read(wire, to_the_end=False).code)
            except TimeoutError:
                codes.append("waiting")
    assert 2 <= codes.count("waiting") <= 4
    until(lambda: count(client, "upload_bytes") == 0)


def test_an_upload_without_budget_is_429_before_the_body_is_sent(serve_with, until):
    client = serve_with(
        FakeRuntime(num_classes=7),
        max_body_bytes=2_000_000,
        max_upload_bytes=2_300_000,
        body_grace_seconds=60,
    )
    with connect(client) as first, connect(client) as second:
        first.sendall(POST + b"Content-Length: 1900000\r\n\r\n" + bytes(1_800_000))
        until(lambda: count(client, "upload_bytes") >= 1_800_000)
        second.sendall(POST + b"Content-Length: 1900000\r\n" + EXPECT + b"\r\n")
        reply = read(second, to_the_end=False)
    assert (reply.status, reply.code, reply.headers["retry-after"]) == (429, "uploads_full", "2")


def test_a_body_limit_above_the_budget_is_an_invalid_setting():
    with pytest.raises(ConfigError, match=r"max_body_bytes .* larger than 7/8 of max_upload_bytes"):
        load_settings(max_body_bytes=900, max_upload_bytes=1000)
