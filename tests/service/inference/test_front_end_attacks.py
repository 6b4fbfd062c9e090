"""What a front end that was taken over can do to the engine: nothing but end its own channel."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.inference.engine_process.channel import RECORD, Kind
from sopdeploy_service.inference.engine_process.engine import MAX_UNREAD_BYTES
from sopdeploy_service.inference.engine_process.slots import Reply, Request
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.runtime.fake import FakeRuntime
from sopdeploy_service.settings import Settings
from tests.service.conftest import Client
from tests.service.inference.test_engine_process import Group, fake_table, front_end


@pytest.fixture
def shared(bundle: Bundle) -> Iterator[Group]:
    """An engine with a model that runs no network."""
    settings = Settings()
    loaded = LoadedModel(bundle=bundle, runtime=FakeRuntime(classes=7), replays={})
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
    memory, channel = evil._memory, evil._channel
    assert memory is not None
    assert channel is not None
    channel.settimeout(20)
    (front,) = [front for front in shared.engine.fronts.values() if front.name == "evil"]
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
