"""The memory budget and the rate limit of request bodies; disconnected clients."""

import threading
from contextlib import ExitStack

import pytest
from fake_runtime import FakeRuntime

from sopdeploy.errors import ConfigError
from sopdeploy_service.settings import load_settings
from tests.service.conftest import open_files
from tests.service.held import Held
from tests.service.raw import EXPECT, POST, connect, count, post_of, read


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


GONE = 'requests_total{code="499",model="tiny",route="/v1/classify"}'


def test_a_disconnect_after_some_bytes_of_the_body_is_counted(serve_with, jpeg, until):
    runtime = FakeRuntime(num_classes=7)
    client = serve_with(runtime)
    for sent in (0, 0, 1, 1, 100):
        with connect(client) as wire:
            wire.sendall(post_of(jpeg)[: len(post_of(jpeg)) - len(jpeg) + sent])
            until(lambda sent=sent: count(client, "upload_bytes") == sent)
    until(lambda: count(client, GONE) == 5)
    assert (count(client, "cancelled_total"), count(client, "upload_bytes")) == (5, 0)
    assert runtime.batches == []
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_a_disconnect_while_queued_or_running_frees_the_queue(serve_with, jpeg, until):
    runtime = Held(largest_batch=1)
    client = serve_with(runtime)
    running = connect(client)
    running.sendall(post_of(jpeg))
    assert runtime.entered.wait(60)
    queued = [connect(client) for _ in range(6)]
    for wire in queued:
        wire.sendall(post_of(jpeg))
    until(lambda: count(client, "queue_depth") == 7)
    assert count(client, "upload_bytes") == 7 * len(jpeg)
    for wire in [running, *queued]:
        wire.close()
    until(lambda: count(client, GONE) == 7)
    assert count(client, "queue_depth") == count(client, "upload_bytes") == 0
    runtime.gate.set()
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    assert runtime.batches == [1, 1]


def test_disconnects_at_every_position_leave_no_file_and_no_thread(serve_with, jpeg, until):
    client = serve_with(FakeRuntime(num_classes=7, fixed_ms=1))
    request = post_of(jpeg)
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    files, threads = open_files(), threading.active_count()
    for cut in range(1, len(request) + 1, 29):
        with connect(client) as wire:
            wire.sendall(request[:cut])
    until(lambda: count(client, "connections") == 1)
    until(lambda: open_files() <= files)
    assert threading.active_count() <= threads + 2  # decoder threads start on demand
    for name in ("queue_depth", "upload_bytes"):
        until(lambda name=name: count(client, name) == 0)
    assert client.post("/v1/classify", content=jpeg).status_code == 200
