"""Disconnected clients: their work is cancelled, counted, and leaves nothing behind."""

import threading

from fake_runtime import FakeRuntime

from tests.service.conftest import open_files
from tests.service.held import Held
from tests.service.raw import connect, count, post_of

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
