"""Front ends that die or were taken over, and an engine that dies or hangs: what the others notice."""

import gc
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import BundleError
from sopdeploy_service.inference.engine_process.channel import RECORD, Kind
from sopdeploy_service.inference.engine_process.engine import MAX_UNREAD_BYTES
from sopdeploy_service.inference.engine_process.models import ModelTable
from sopdeploy_service.inference.engine_process.slots import MAX_SLOTS, Reply, Request
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.settings import Settings
from tests.service.conftest import Client, open_files
from tests.service.held import Held
from tests.service.inference.test_engine_process import Group, fake_table, front_end


@pytest.fixture
def runtime() -> Held:
    """A runtime that runs no network; tests may hold it back."""
    runtime = Held()
    runtime.gate.set()
    return runtime


@pytest.fixture
def shared(bundle: Bundle, runtime: Held) -> Iterator[Group]:
    """An engine with one model."""
    settings = Settings()
    loaded = LoadedModel(bundle=bundle, runtime=runtime, replays={})
    made = Group(fake_table({"tiny": loaded}, settings), settings)
    made.start()
    with ExitStack() as stack:
        stack.callback(made.stop)
        stack.callback(made.stack.close)
        yield made


@pytest.fixture
def client(shared: Group, bundle: Bundle) -> Iterator[Client]:
    """A client of a correct front end of the same engine."""
    with front_end(shared, bundle) as client:
        yield client


def test_a_front_end_that_reads_no_replies_is_cut_off(
    shared: Group, client: Client, jpeg: bytes, until
) -> None:
    evil = shared.connect("evil")
    memory, channel = evil._pool, evil._channel
    assert memory is not None
    assert channel is not None
    channel.settimeout(20)
    (front,) = [front for front in shared.engine.fronts.values() if front.name == "evil"]
    front.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # soon full
    late = time.monotonic() - 1  # such an image gets its reply at once
    for generation in range(1, 100_000):
        records = []
        for slot in range(memory.slots.count):
            memory.slots.write_reply(slot, Reply(0))
            memory.slots.write_request(slot, Request(1, 0, 0, late, late, generation))
            records.append(RECORD.pack(Kind.SUBMIT, 0, slot, generation))
        try:
            channel.sendall(b"".join(records))
        except OSError:
            break
        until(lambda: front.closed or memory.slots.read_reply(memory.slots.count - 1).code > 0)
        assert front.outbox.num_bytes <= MAX_UNREAD_BYTES + RECORD.size * memory.slots.count
    until(lambda: front.closed)
    evil.stop()
    assert client.post("/v1/classify", content=jpeg).status_code == 200


KINDS = [*Kind, 0, 77, 255]
NUMBERS = (0, 1, 2**32 - 1)  # neither is a correct number for a slot that was never written
RECORDS = [
    RECORD.pack(kind, memory, slot, number)
    for kind in KINDS
    for memory in (0, 1, 255)
    for slot in (0, 65_535)
    for number in NUMBERS
]


def test_no_record_disturbs_the_engine_or_another_front_end(
    shared: Group, client: Client, jpeg: bytes, until
) -> None:
    for piece in (RECORDS[0][:3], *RECORDS):
        evil = shared.connect("evil")
        assert evil._channel is not None
        evil._channel.send(piece)
        evil.stop()
    until(lambda: len(shared.engine.fronts) == 1)
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    assert client.engine.num_free == MAX_SLOTS


HUGE, NAN = 2**32 - 1, float("nan")
# Model, flags, length, arrival and deadline after now: contents of a slot that was submitted correctly.
CONTENTS: dict[str, tuple[int, int, int, float, float]] = {
    "zeros": (1, 0, 0, 0.0, 0.0),
    "times that are not numbers": (1, 0, 0, NAN, NAN),
    "endless times": (1, 0, 0, float("-inf"), float("inf")),
    "unknown flags": (1, HUGE ^ 2, HUGE, -1.0, 9.0),
    "a long command": (1, 2, HUGE, 0.0, 9.0),
    "an empty command": (0, 2, 0, 0.0, 9.0),
    "another model": (HUGE, 0, 0, 0.0, 9.0),
}
COMMANDS = (
    b"",
    b"[",
    b"{}",
    b"[" * 4096,
    b'{"operation": "load", "name": 1, "folder": null}',
    b"\xff" * 4096,
)


def test_no_content_of_a_slot_disturbs_the_engine_or_another_front_end(
    shared: Group, client: Client, jpeg: bytes, until
) -> None:
    for model, flags, length, arrived, deadline in CONTENTS.values():
        for command in COMMANDS if flags & 2 else (b"",):
            evil = shared.connect("evil")
            (slot,) = evil.take(1) or ()
            slot.pool.slots.write_bytes(slot.number, command)
            now = time.monotonic()
            request = Request(model, flags, length, now + arrived, now + deadline, slot.generation)
            evil.submit(slot, SimpleNamespace(on_reply=lambda *_: None), request)
            evil.stop()
    until(lambda: len(shared.engine.fronts) == 1)
    until(lambda: client.engine.images_elsewhere == 0)
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_files_of_a_front_end_are_not_kept(shared: Group, client: Client, jpeg: bytes, until) -> None:
    evil = shared.connect("evil")
    assert evil._channel is not None
    assert client.post("/v1/classify", content=jpeg).status_code == 200  # opens its connection
    before = open_files()
    with Path("/dev/null").open("rb") as file:
        for _ in range(20):
            socket.send_fds(evil._channel, [RECORD.pack(Kind.RELEASE, 0, 0, 99)], [file.fileno()] * 10)
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    until(lambda: open_files() == before)
    evil.stop()


def mapped_slots() -> int:
    """Count the parts of this process's memory that are slots."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("sopdeploy-slots")


def test_fifty_front_ends_that_die_with_images_leave_no_slot_and_no_memory(
    shared: Group, runtime: Held, client: Client, jpeg: bytes, until
) -> None:
    before = mapped_slots()
    runtime.gate.clear()
    for _ in range(50):
        dying = shared.connect("dying")
        now = time.monotonic()
        for slot in dying.take(3) or ():
            request = Request(1, 0, 0, now, now + 99, slot.generation)
            dying.submit(slot, SimpleNamespace(on_reply=lambda *_: None), request)
        dying.stop()
        del dying, slot
    until(lambda: len(shared.engine.fronts) == 1)
    runtime.gate.set()
    until(lambda: client.engine.images_elsewhere == 0)
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    until(lambda: mapped_slots() == before)
    assert sum(runtime.batches) <= 2 + 3  # two images of the test, and those of the first front end


def test_all_requests_are_settled_in_the_callback_that_notices_the_end_of_the_engine(
    shared: Group, runtime: Held, client: Client, jpeg: bytes, until
) -> None:
    runtime.gate.clear()
    settled: Future[list[bool]] = Future()

    def notice() -> None:
        waiting = [slot.item.outcome for slot in client.engine.waiting()]
        client.engine.lose()
        settled.set_result([outcome.done() for outcome in waiting])

    with ThreadPoolExecutor(24) as pool:
        held = [pool.submit(client.post, "/v1/classify", content=jpeg) for _ in range(24)]
        until(lambda: len(client.engine.waiting()) == 24)
        client.loop.call_soon_threadsafe(notice)
        assert settled.result(20) == [True] * 24
        answers = [reply.result() for reply in held]
    assert {(reply.status_code, reply.json()["code"]) for reply in answers} == {(503, "engine_dead")}
    assert {reply.headers["retry-after"] for reply in answers} == {"5"}
    runtime.gate.set()
    shared.reconnect(shared.fronts)
    until(lambda: client.get("/readyz").status_code == 200)
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_an_image_that_fails_its_batch_fails_alone(
    shared: Group, runtime: Held, client: Client, jpeg: bytes, make_picture, monkeypatch
) -> None:
    run = Held.run

    def fail(self: Held, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        if images.max(axis=(1, 2, 3)).min() == 0:
            raise ValueError("a black image")
        return run(self, images)

    monkeypatch.setattr(Held, "run", fail)
    black = make_picture((0, 0, 0), kind="PNG")
    form = [("image", body) for body in (jpeg, black, jpeg, b"no image", jpeg)]
    results = client.post("/v1/classify", files=form).json()["results"]
    codes = [result.get("error", {}).get("code") for result in results]
    assert codes == [None, "engine_failed", None, "not_an_image", None]


def test_the_longest_error_of_a_command_fits_into_a_slot(
    shared: Group, client: Client, jpeg: bytes, monkeypatch
) -> None:
    def find(*_: object, **__: object) -> Path:
        raise BundleError("several bundles have this name: " + "\N{GRINNING FACE}" * 9000)

    settings = Settings(model_control=True)
    table = SimpleNamespace(_settings=settings, by_name={}, _store=SimpleNamespace(find=find))
    table._load = partial(ModelTable._load, table)
    monkeypatch.setattr(shared.table, "change", partial(ModelTable.change, table))
    client.app.state.service.registry._settings = settings
    reply = client.post("/v2/repository/models/tiny/load")
    assert (reply.status_code, reply.headers["x-error-code"]) == (400, "cannot_load")
    assert reply.json()["error"].startswith("several bundles")
    assert client.post("/v1/classify", content=jpeg).status_code == 200
