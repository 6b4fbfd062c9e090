"""Decoder processes: images that misuse them fail alone, and the memory of all children is limited."""

import asyncio
import errno
import json
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sopdeploy.errors import ConfigError, RuntimeUnavailableError
from sopdeploy.images.limits import MAX_PIXELS
from sopdeploy_service.decoding import pool
from sopdeploy_service.decoding.child import FAILED, ChildOptions
from sopdeploy_service.devices.template import LIBC, SET_SUBREAPER
from sopdeploy_service.inference import decoders, shared_children
from sopdeploy_service.inference.decoders import (
    LARGE_MEMORY,
    LIGHT_MEMORY,
    LIGHT_PIXELS,
    plan_children,
)
from sopdeploy_service.inference.results import DECODERS_BUSY, DRAINING, RejectedError
from sopdeploy_service.inference.shared_children import SharedChildren
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings
from tests.service.decoding.misbehaving import START
from tests.service.decoding.sandboxed import TAKES_MEMORY
from tests.support import hostile_images as hostile
from tests.support.children import is_alive
from tests.support.decoding import RULES, error_of, running_child
from tests.support.fake_runtime import FakeRuntime
from tests.support.pictures import encoded
from tests.support.raw import count
from tests.support.service import Client, picture_bytes, wait_for

MIB = 1 << 20
linux = pytest.mark.skipif(
    platform.system() != "Linux", reason="limits of memory exist on Linux only"
)
OPTIONS = ChildOptions(
    memory=LIGHT_MEMORY,
    niceness=0,
    is_light=True,
    max_bytes=20_000_000,
    max_pixels=70_000_000,
    sandbox="auto",
)
LARGE = OPTIONS._replace(memory=LARGE_MEMORY, is_light=False)
SMALL = OPTIONS._replace(memory=8 * MIB)


def test_little_memory_for_large_images_is_a_warning(caplog) -> None:
    for budget, max_pixels, memory, warns in (
        (64 << 30, 50_000, LIGHT_MEMORY, False),  # a body may be larger than its pixels
        (64 << 30, 5_000_000, 100_000_000, False),
        (350 * MIB, 5_000_000, 100_000_000, False),
        (350 * MIB, 70_000_000, 166 * MIB, True),
    ):
        assert plan_children(budget, 2, max_pixels).large_memory == memory
        assert ("decoders" in caplog.text) == warns


# Files that no decoder accepts, or that one refuses by its header; code
NO_IMAGES = {
    "text": (b"hello", "not_an_image"),
    "a PDF": (b"%PDF-1.4\n" + bytes(300), "unsupported_format"),
    "a TIFF": (b"II*\0" + bytes(200), "unsupported_format"),
    "a file without bytes": (b"", "empty_body"),
    "a JPEG that was cut": (picture_bytes()[:100], "truncated_image"),
    "a JPEG of 200 megapixels": (hostile.jpeg(20_000, 10_000)[:2000], "too_many_pixels"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_files_that_no_decoder_accepts_need_none_for_large_images(
    serve_with, jpeg, name
) -> None:
    body, code = NO_IMAGES[name]
    client = serve_with(FakeRuntime(num_classes=7))
    files = [("image", (f"{number}.jpg", body)) for number in range(12)]
    with holding_large(client):
        reply = client.post("/v1/classify", files=[("image", jpeg), *files])
    results = reply.json()["results"]

    assert "classes" in results[0]
    assert [one["error"]["code"] for one in results[1:]] == [code] * 12


def test_images_that_find_no_decoder_fail_alone(serve_with, jpeg, monkeypatch) -> None:
    monkeypatch.setattr(shared_children, "MAX_WAITING", 0)
    client = serve_with(FakeRuntime(num_classes=7))
    large = ("image", hostile.jpeg(4000, 3000))
    with holding_large(client):
        reply = client.post("/v1/classify", files=[("image", jpeg), large])
        alone = client.post("/v1/classify", files=[large, large])
    answered, refused = reply.json()["results"]

    assert reply.status_code == 200
    assert "classes" in answered
    assert refused["error"]["code"] == "decoders_busy"
    assert (alone.status_code, alone.json()["code"]) == (503, "decoders_busy")


@pytest.fixture
def template(monkeypatch) -> Iterator[pool.DecoderTemplate]:
    """The template of servers of a test, whose children misbehave."""
    template = pool.DecoderTemplate("tests.service.decoding.misbehaving")
    monkeypatch.setattr(decoders, "shared_template", lambda: template)
    yield template
    template.close()


@pytest.mark.slow
@pytest.mark.usefixtures("template")
def test_images_that_misuse_their_children_fail_alone(serve_with, jpeg, monkeypatch) -> None:
    monkeypatch.setattr(decoders, "DECODE_SECONDS", 2)
    client = serve_with(FakeRuntime(num_classes=7), request_timeout=120)
    misused = (b"hang", b"nonsense", b"too little", b"long message")
    expected = {START + name: (422, "damaged_image") for name in misused}
    expected[START + b"bug"] = (500, "decoder_failed")
    expected[START + b"die"] = (422, "decoder_crashed")

    with ThreadPoolExecutor(8) as threads:
        bad = {
            body: threads.submit(client.post, "/v1/classify", content=body) for body in expected
        }
        good = [threads.submit(client.post, "/v1/classify", content=jpeg) for _ in range(70)]
        refused = {body: reply.result() for body, reply in bad.items()}
        assert {
            body: (one.status_code, one.json()["code"]) for body, one in refused.items()
        } == expected
        assert [reply.result().status_code for reply in good] == [200] * 70

    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_children_that_are_killed_or_send_too_much_are_replaced(jpeg, template) -> None:
    with running_child(template, OPTIONS) as child:
        expected = child.decode(jpeg).data.tolist()
        for _ in range(3):
            before = child.process
            os.kill(before, signal.SIGKILL)
            wait_for(lambda: child._transport is None)
            assert child.decode(jpeg).data.tolist() == expected
            assert child.process != before

        before = child.process
        assert child.decode(jpeg + b"too many").data.tolist() == expected
        wait_for(lambda: child._transport is None)
        assert child.decode(jpeg).data.tolist() == expected
        assert child.process != before

        template.close()  # which ends the child
        wait_for(lambda: child._transport is None)
        assert child.decode(jpeg).data.tolist() == expected


def test_a_child_that_sends_too_much_is_replaced_before_the_next_image(jpeg, template) -> None:
    with running_child(template, OPTIONS) as child:
        before = child.process
        replies = child.decode_all([jpeg + b"too many", jpeg, jpeg])

        assert [error_of(reply) for reply in replies] == ["", "", ""]
        assert child.process != before


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "too many files"), RuntimeError("no thread")]
)
def test_a_child_that_cannot_be_replaced_fails_one_image_only(
    jpeg, template, monkeypatch, error
) -> None:
    def fail(*_: object) -> None:
        raise error

    with running_child(template, OPTIONS) as child:
        os.kill(child.process, signal.SIGKILL)
        wait_for(lambda: child._transport is None)
        with monkeypatch.context() as patched:
            patched.setattr(template, "fork", fail)
            assert error_of(child.decode(jpeg)) == "ended"
        assert error_of(child.decode(jpeg)) == ""


def test_images_that_wait_or_come_after_the_end_are_refused() -> None:
    children = SharedChildren(Metrics())
    loop = asyncio.new_event_loop()
    early, late = (pool.Request(b"", b"", 0, range(0), loop.create_future()) for _ in range(2))
    children.put(early, None)
    children.close()
    children.put(late, None)

    assert [request.result.result() for request in (early, late)] == [DRAINING] * 2

    loop.close()


def kill_the_decoder_that_hangs(caplog, number: int) -> None:
    """Wait until decoders have hung *number* times, and kill the last one."""
    wait_for(lambda: caplog.text.count(" hangs\n") >= number)
    process = re.findall(r"process (\d+) hangs", caplog.text)[-1]
    os.kill(int(process), signal.SIGKILL)


@linux
@pytest.mark.usefixtures("template")
@pytest.mark.parametrize(
    ("num_kills", "expected"),
    [(1, (200, None)), (2, (503, "decoder_killed"))],
    ids=["hangs once", "hangs each time"],
)
def test_an_image_whose_child_is_killed_is_decoded_once_more(
    serve_with, jpeg, caplog, num_kills, expected, monkeypatch
) -> None:
    monkeypatch.setattr(decoders, "DECODE_SECONDS", 60)
    client = serve_with(FakeRuntime(num_classes=7), request_timeout=120)
    body = jpeg + b"hang once" if num_kills == 1 else START + b"hang"

    with ThreadPoolExecutor(1) as threads:
        posted = threads.submit(client.post, "/v1/classify", content=body)
        for number in range(1, num_kills + 1):
            kill_the_decoder_that_hangs(caplog, number)
        reply = posted.result()

    assert (reply.status_code, reply.json().get("code")) == expected
    assert count(client, 'decoder_ended_total{reason="SIGKILL"}') >= num_kills
    assert caplog.text.count("ended (SIGKILL)") >= num_kills
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_a_system_without_room_for_a_process_is_one_error_line(monkeypatch) -> None:
    template = pool.DecoderTemplate()
    monkeypatch.setattr(template, "ask", lambda *_: (0, errno.EAGAIN))

    with pytest.raises(RuntimeUnavailableError, match=r"do not start"):
        template.fork(OPTIONS)


@linux
def test_a_child_reaches_nothing_and_has_no_environment(template) -> None:
    with running_child(template, OPTIONS) as child:
        assert re.fullmatch(
            r"no_new_privs, (landlock \d+|no landlock), seccomp", child.restrictions
        )
        assert json.loads(child.decode(b"forbidden").data.tobytes()) == [[errno.EPERM], {}]

        environment = Path(f"/proc/{child.process}/environ").read_bytes()
        assert environment == b"OPENBLAS_NUM_THREADS=1\0"
        # Standard streams and its socket
        assert len(list(Path(f"/proc/{child.process}/fd").iterdir())) == 4


KILLS_ITSELF = """
import os, signal
from sopdeploy_service.decoding.pool import shared_template
from tests.service.inference.test_decoders import OPTIONS
connection, child = shared_template().fork(OPTIONS)
connection.recv(1)
print(shared_template()._process.pid, child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("is_subreaper", [True, False])
def test_template_and_child_of_decoders_end_with_their_server(is_subreaper) -> None:
    LIBC.prctl(SET_SUBREAPER, int(is_subreaper))
    try:
        done = subprocess.run(
            [sys.executable, "-c", KILLS_ITSELF],
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            start_new_session=not is_subreaper,
        )
    finally:
        LIBC.prctl(SET_SUBREAPER, 0)

    assert done.returncode == -signal.SIGKILL
    for process in map(int, done.stdout.split()):
        wait_for(lambda process=process: not is_alive(process))


@linux
def test_no_kind_of_memory_of_a_child_is_without_limit(template) -> None:
    with running_child(template, OPTIONS) as child:
        errors = json.loads(child.decode(START + b"memory").data.tobytes())
    assert errors == dict.fromkeys(TAKES_MEMORY, errno.ENOMEM)


# Options, file, error
COSTLY = {
    "one prefix code per block": (
        OPTIONS,
        lambda: hostile.webp_codes(868, 868),
        "damaged_image",
    ),
    "the same for a large child": (
        LARGE,
        lambda: hostile.webp_codes(2000, 1500),
        "damaged_image",
    ),
    "a WebP that is too large": (
        OPTIONS,
        lambda: hostile.webp_lossless(6000, 4000),
        "too_much_memory",
    ),
    "an AVIF that is too large": (
        SMALL,
        lambda: encoded(Image.new("L", (3000, 3000)), "AVIF", speed=10),
        "too_much_memory",
    ),
    "an AVIF that hides its size": (
        SMALL,
        lambda: re.sub(
            rb"ispe.{12}",
            b"ispe" + struct.pack(">III", 0, 64, 64),
            encoded(Image.new("L", (3000, 3000)), "AVIF", speed=10),
            flags=re.DOTALL,
        ),
        "damaged_image",
    ),
    "more than the memory": (
        LARGE,
        lambda: hostile.webp_lossless(8000, 6000),
        "too_much_memory",
    ),
}


@linux
@pytest.mark.parametrize("name", COSTLY)
def test_a_file_that_needs_too_much_memory_fails_alone(jpeg, name) -> None:
    options, make, expected = COSTLY[name]
    with running_child(pool.shared_template(), options) as child:
        process = child.process
        assert error_of(child.decode(make())) == expected
        assert len(child.decode(jpeg).data) == 32 * 32 * 3
        assert child.process == process


@linux
def test_a_child_has_its_time_for_each_image_only(jpeg) -> None:
    with running_child(pool.shared_template(), LARGE, limit=5.0) as child:
        process = child.process
        assert error_of(child.decode(jpeg)) == ""
        assert child._timer.cancelled()
        assert error_of(child.decode(jpeg)) == ""
        assert child.process == process

    with running_child(pool.shared_template(), LARGE, limit=0.0) as child:
        assert child.decode(jpeg) == pool.ChildEnded(pool.TIME)


@linux
def test_a_light_child_ends_at_its_cpu_time() -> None:
    body = hostile.jpeg(1700, 1700, sampling=0x22, scans=98)
    with running_child(pool.shared_template(), OPTIONS) as child:
        assert child.decode(body, seconds=0.01) == pool.ChildEnded(pool.TIME)


def test_an_image_too_large_for_a_light_child_is_decoded_by_another(
    serve_with, monkeypatch
) -> None:
    body = hostile.webp_lossless(3000, 2000)  # needs 120 MB
    monkeypatch.setattr(decoders, "light_seconds", lambda *_: 10.0)
    client = serve_with(FakeRuntime(num_classes=7))

    assert client.post("/v1/classify", content=body).status_code == 200


def test_many_photographs_that_are_decoded_in_full_wait(serve_with, monkeypatch) -> None:
    # Limits and images have a hundredth of their usual pixels.
    most = decoders.MAX_PIXELS // 100
    monkeypatch.setattr(decoders, "MAX_PIXELS", most)
    monkeypatch.setattr(decoders, "LIGHT_PIXELS", LIGHT_PIXELS // 100)
    client = serve_with(FakeRuntime(num_classes=7), request_timeout=120, max_pixels=most)
    body = picture_bytes(size=(400, 300))

    with ThreadPoolExecutor(32) as threads:
        with holding_large(client):
            posted = [
                threads.submit(client.post, "/v1/classify", content=body) for _ in range(32)
            ]
            wait_for(
                lambda: (
                    sum(map(len, client.app.state.service.decoders.large._groups.values()))
                    == 32
                )
            )

        assert {one.result().status_code for one in posted} == {200}


@contextmanager
def holding_large(client: Client) -> Iterator[None]:
    """Keep every child for large images busy."""
    service = client.app.state.service.decoders
    held = list(service.large.idle)
    service.large.idle[:] = []
    yield
    for child in held:
        service._loop.call_soon_threadsafe(service.large.give_work, child)


def test_a_large_image_waits_for_few_others_and_passes_none(
    serve_with, jpeg, monkeypatch
) -> None:
    monkeypatch.setattr(shared_children, "MAX_WAITING", 0)
    client = serve_with(FakeRuntime(num_classes=7))
    with holding_large(client):
        refused = client.post("/v1/classify", content=hostile.jpeg(4000, 3000))

    assert (refused.status_code, refused.json()["code"]) == (503, "decoders_busy")
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    assert count(client, "decoders") == 2


# Arrivals: a client is a letter, in capitals for its slow images, and `.` is the server itself.
# Then which of them, numbered from 0, are refused, and the order of the others.
ARRIVALS = {
    "one client has all places": ("aaaaaaaaaa", "89", "01234567"),
    "another client gets one of them": ("aaaaaaaab", "7", "08123456"),
    "slow images leave room for large ones": ("AAAAAAAAAAa", "897", "0 10 1 2 3 4 5 6"),
    "two clients have half each": ("aaaaaaaabbbbbb", "7 6 5 4 12 13", "0 8 1 9 2 10 3 11"),
    "a client with as many is refused itself": ("aabbccddd", "8", "02461357"),
    "eight clients have one each": ("abcdefghi", "8", "01234567"),
    "copies of the server are not refused": ("........a..", "8", "0 1 2 3 4 5 6 7 9 10"),
    "and do not lose their place": (".......aab", "8 9", "0 7 1 2 3 4 5 6"),
}


@pytest.mark.parametrize(("arrivals", "refused", "order"), ARRIVALS.values(), ids=ARRIVALS)
def test_clients_share_the_places_of_large_images_and_take_turns(
    arrivals, refused, order
) -> None:
    children = SharedChildren(Metrics())
    loop = asyncio.new_event_loop()
    requests = [
        pool.Request(b"", b"", 0, range(0), loop.create_future(), MAX_PIXELS) for _ in arrivals
    ]
    for request, client in zip(requests, arrivals, strict=True):
        children.put(request, None if client == "." else (client.lower(), client.isupper()))
    ended = {number for number, request in enumerate(requests) if request.result.done()}

    assert ended == {int(number) for number in (refused.split() if " " in refused else refused)}
    ran: list[int] = []
    child = SimpleNamespace(run=lambda request: ran.append(requests.index(request)))
    while not children.idle:
        children.give_work(child)

    assert ran == [int(number) for number in (order.split() if " " in order else order)]
    loop.close()


@pytest.mark.parametrize("clients", ["aaaaaaaa", "bcdefghi"])
def test_images_for_which_nobody_waits_free_their_places_and_their_memory(clients) -> None:
    async def scenario() -> None:
        children = SharedChildren(Metrics())
        loop = asyncio.get_running_loop()

        def put(client: str) -> pool.Request:
            request = pool.Request(
                BytesIO(), b"", 0, range(0), loop.create_future(), MAX_PIXELS
            )
            children.put(request, (client, False))
            return request

        requests = [put(client) for client in clients]
        images = [weakref.ref(request.image) for request in requests]
        for request in requests[::2]:
            request.result.cancel()  # the client has left
        for request in requests[1::2]:
            request.settle(DRAINING)  # its deadline has passed
        del request, requests
        await asyncio.sleep(0)
        assert [image() for image in images] == [None] * 8
        assert not put("a").result.done()

    asyncio.run(scenario())


def test_ten_slow_images_leave_room_for_a_photograph_of_another_client(
    serve_with, monkeypatch
) -> None:
    monkeypatch.setattr(decoders, "MAX_PIXELS", 120_000)  # eight of these have room
    monkeypatch.setattr(decoders, "LIGHT_PIXELS", LIGHT_PIXELS // 100)
    options = {"decoders": 1, "trusted_proxies": "127.0.0.1", "max_pixels": 120_000}
    client = serve_with(FakeRuntime(num_classes=7), **options)
    large = hostile.jpeg(400, 300)

    def post(number: int, address: str) -> int:
        # A client can send the first part, to which its proxy adds an element or, for all but
        # one, a line.
        values = [f"{number}.9.9.9", address] if number else [f"{number}.9.9.9, {address}"]
        headers = [("x-forwarded-for", value) for value in values]
        return client.post("/v1/classify", content=large, headers=headers).status_code

    with ThreadPoolExecutor(11) as threads:
        with holding_large(client):
            many = [threads.submit(post, number, "10.0.0.1") for number in range(10)]
            wait_for(lambda: sum(one.done() for one in many) == 2)
            other = threads.submit(post, 0, "10.0.0.2")
            wait_for(lambda: sum(one.done() for one in many) == 3)
        assert other.result() == 200
        assert sorted(one.result() for one in many) == [200] * 7 + [503] * 3


def slow_clients(num_light: int) -> decoders.Decoders:
    """Decoders, within a loop, with so many light children, to which every client has sent a slow image."""
    served = decoders.Decoders(num_light, Settings(), Metrics())
    served._loop = asyncio.get_running_loop()
    served._light_turns = asyncio.Semaphore(max(1, num_light // 2))
    for client in "abcd":
        served._note_slow(client)
    served.large.idle.append(SimpleNamespace())  # type: ignore[arg-type]
    return served


@pytest.mark.parametrize(("num_light", "at_once"), [(1, 1), (2, 1), (8, 4)])
def test_clients_with_slow_images_take_turns_in_half_of_the_light_children(
    monkeypatch, jpeg, num_light, at_once
) -> None:
    running: list[int] = []

    async def run(request: pool.Request, children: object, **_: object) -> pool.Reply:
        running.append(sum(running[-1:]) + 1)
        await asyncio.sleep(0)
        running.append(running[-1] - 1)
        return pool.Reply(pool.child.PIXELS, 0, np.zeros(RULES.crop**2 * 3, np.uint8))

    async def scenario() -> None:
        served = slow_clients(num_light)
        monkeypatch.setattr(served, "_run", run)
        await asyncio.gather(*(served.decode(jpeg, RULES, client=one) for one in "abcdabcd"))

    asyncio.run(scenario())
    assert max(running) == at_once


def test_an_image_of_a_slow_client_needs_room_for_a_slow_one(monkeypatch, jpeg) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(shared_children, "MAX_WAITING", 0)
        served = slow_clients(2)
        served.large.idle.clear()
        with pytest.raises(RejectedError) as refused:
            await served.decode(jpeg, RULES, client="a")

        assert refused.value.reason is DECODERS_BUSY
        # Another client, and the same one later, do not ask.
        waiting = [asyncio.ensure_future(served.decode(jpeg, RULES, client="e"))]
        monkeypatch.setattr(decoders, "SLOW_SECONDS", -1.0)
        served._note_slow("a")
        waiting.append(asyncio.ensure_future(served.decode(jpeg, RULES, client="a")))
        await asyncio.sleep(0)

        assert sum(map(len, served.light._groups.values())) == 2
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(scenario())


def test_a_required_sandbox_is_an_error_where_auto_warns(monkeypatch) -> None:
    message = "Darwin on x86_64"
    # The first message, without a sandbox
    header = pool.child.REPLY.pack(0, FAILED, 0, len(message))
    replies = {len(header): header, len(message): message.encode()}
    monkeypatch.setattr(pool.child, "receive", lambda _end, count, _deadline: replies[count])
    required = OPTIONS._replace(sandbox="required")

    with (
        pytest.raises(ConfigError, match=message),
        running_child(pool.shared_template(), required),
    ):
        pass

    with running_child(pool.shared_template(), OPTIONS) as child:
        assert child.restrictions == f"no sandbox ({message})"
