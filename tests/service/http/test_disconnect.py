"""Clients that hang up: nobody computes for them, they are counted, and nothing of theirs stays behind."""

import asyncio
import threading
from pathlib import Path

import pytest

from sopdeploy_service.http.disconnect import DEPARTURE, Disconnect, cancel_on_disconnect
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.inference.results import CLIENT_GONE
from sopdeploy_service.runtime.fake import FakeRuntime
from tests.service.held import Held
from tests.service.raw import POST, connect, count

GONE = 'requests_total{code="499",model="tiny",route="/v1/classify"}'


def length(jpeg: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % len(jpeg)


@pytest.mark.parametrize("sent", [0, 1, 100], ids=["before", "at the start of", "in the middle of"])
def test_who_leaves_in_its_body_is_counted_and_forgotten(serve_with, jpeg, until, sent):
    runtime = FakeRuntime(classes=7)
    client = serve_with(runtime)
    for _ in range(5):
        with connect(client) as wire:
            wire.sendall(POST + length(jpeg) + jpeg[:sent])
            until(lambda: count(client, "upload_bytes") == sent)
    until(lambda: count(client, GONE) == 5)
    assert count(client, "cancelled_total") == 5
    assert count(client, "upload_bytes") == 0
    assert runtime.batches == []
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_who_leaves_in_a_form_is_counted_and_forgotten(serve_with, until):
    client = serve_with(FakeRuntime(classes=7))
    with connect(client) as wire:
        wire.sendall(
            POST + b"Content-Type: multipart/form-data; boundary=XX\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'40\r\n--XX\r\nContent-Disposition: form-data; name="image"; filename="a"'
        )
        until(lambda: count(client, "upload_bytes") > 0)
    until(lambda: count(client, GONE) == 1)
    assert count(client, "upload_bytes") == 0


def test_who_leaves_while_its_image_waits_or_is_computed_is_counted_and_forgotten(serve_with, jpeg, until):
    runtime = Held(largest_batch=1)
    client = serve_with(runtime)
    computed = connect(client)
    computed.sendall(POST + length(jpeg) + jpeg)
    assert runtime.entered.wait(10)
    waiting = [connect(client) for _ in range(6)]
    for wire in waiting:
        wire.sendall(POST + length(jpeg) + jpeg)
    until(lambda: count(client, "queue_depth") == 7)
    assert count(client, "upload_bytes") == 7 * len(jpeg)
    for wire in [computed, *waiting]:
        wire.close()
    until(lambda: count(client, GONE) == 7)
    assert count(client, "queue_depth") == count(client, "upload_bytes") == 0
    runtime.gate.set()
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    assert runtime.batches == [1, 1]


@pytest.mark.parametrize("told", [True, False], ids=["told by the connection", "asking the server"])
@pytest.mark.parametrize("when", ["before", "meanwhile", "never"])
def test_work_ends_when_its_client_has_left_and_only_then(told, when):
    ends = []

    async def work() -> str:
        try:
            await asyncio.sleep(0 if when == "never" else 20)
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        return "done"

    async def run() -> str:
        departure, left = Disconnect(), asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        def leave() -> None:
            left.set()
            departure.happen()

        if when == "before":
            leave()
        elif when == "meanwhile":
            asyncio.get_running_loop().call_later(0.01, leave)
        return await cancel_on_disconnect(work(), {"state": {DEPARTURE: departure} if told else {}}, receive)

    if when == "never":
        assert asyncio.run(run()) == "done"
        return
    with pytest.raises(RejectedError) as refused:
        asyncio.run(run())
    assert refused.value.refusal is CLIENT_GONE
    assert ends == ([] if told and when == "before" else ["cancelled"])


@pytest.mark.parametrize("told", [True, False])
def test_who_is_cancelled_for_another_reason_is_told_so(told):
    async def run() -> None:
        async def receive() -> dict[str, str]:
            await asyncio.Event().wait()
            return {}

        scope = {"state": {DEPARTURE: Disconnect()} if told else {}}
        task = asyncio.ensure_future(cancel_on_disconnect(asyncio.sleep(20), scope, receive))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_crowd_that_leaves_at_every_point_leaves_no_file_and_no_thread(serve_with, jpeg, until):
    client = serve_with(FakeRuntime(classes=7, fixed_ms=1))
    request = POST + length(jpeg) + jpeg
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    files, threads = open_files(), threading.active_count()
    for cut in range(1, len(request) + 1, 3):
        with connect(client) as wire:
            wire.sendall(request[:cut])
    until(lambda: count(client, "connections") == 1)
    until(lambda: open_files() <= files)
    assert threading.active_count() <= threads + 2  # decoders start when they are needed
    for held in ("queue_depth", "upload_bytes"):
        until(lambda held=held: count(client, held) == 0)
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0
