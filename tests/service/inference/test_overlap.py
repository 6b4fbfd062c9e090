"""A device that can hold two batches gets the next one before the previous one has ended."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_runtime import FakeOverlappingRuntime

from sopdeploy.bundle.probes import Probes
from sopdeploy.errors import ParityError
from sopdeploy_service.inference.loader import replay_overlapping
from sopdeploy_service.runtime.base import DeviceLostError
from tests.service.held import Held
from tests.service.raw import connect, count, post_of

MAX_BATCH = 2
COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10), (10, 250, 250), (250, 10, 250)]


class Scripted(FakeOverlappingRuntime):
    """Records the order of calls; a batch ends when `gate` is set.

    *errors* has exceptions by batch number and by when they are raised: 0 at its begin, 1 at its end.
    """

    def __init__(self, errors=None) -> None:
        super().__init__(num_classes=7, largest_batch=MAX_BATCH)
        self.errors = errors or {}
        self.gate = threading.Event()
        self.calls: list[str] = []

    def begin(self, images, names=None):
        number = len(self.batches) + 1
        self.calls.append(f"begin {number}")
        wait = super().begin(images)
        if error := self.errors.get((number, 0)):
            raise error

        def end():
            self.calls.append(f"wait {number}")
            self.gate.wait(60)
            if error := self.errors.get((number, 1)):
                raise error
            return wait()

        return end


@pytest.fixture
def pool():
    with ThreadPoolExecutor(24) as pool:
        yield pool


@pytest.fixture
def classify(serve_with, make_picture, pool, until):
    """`classify(runtime, 5)` sends one image, then four while it runs; returns responses and client."""

    def post(client, image):
        return client.post("/v1/classify?top_k=1", content=image)

    def send(runtime, count):
        client = serve_with(runtime, decoders=1)
        images = [make_picture(color) for color in COLORS[:count]]
        futures = [pool.submit(post, client, images[0])]
        until(lambda: "wait 1" in runtime.calls)
        for number, image in enumerate(images[1:], 2):  # keeps the order
            futures.append(pool.submit(post, client, image))
            decoded = f'stage_duration_seconds_count{{stage="decode"}} {number}.0'
            until(lambda decoded=decoded: decoded in client.get("/metrics").text)
        runtime.gate.set()
        return [future.result(60) for future in futures], client

    return send


def test_a_full_batch_begins_while_another_runs_and_a_partial_one_waits(classify):
    runtime = Scripted()
    replies, _ = classify(runtime, 6)
    assert [reply.status_code for reply in replies] == [200] * 6
    assert runtime.batches == [1, 2, 2, 1]
    assert runtime.calls[:2] == ["begin 1", "wait 1"]
    assert runtime.calls[2:] == ["begin 2", "begin 3", "wait 2", "wait 3", "begin 4", "wait 4"]


@pytest.mark.parametrize(("number", "where"), [(2, 0), (3, 1)], ids=["begin", "end"])
def test_a_failed_batch_is_halved_and_other_batches_are_unaffected(classify, number, where):
    runtime = Scripted({(number, where): RuntimeError("once")})
    replies, _ = classify(runtime, 5)
    assert [reply.status_code for reply in replies] == [200] * 5
    assert sorted(runtime.batches) == [1, 1, 1, 2, 2]


def test_a_lost_device_ends_the_model(classify):
    replies, client = classify(Scripted({(2, 1): DeviceLostError("gone")}), 6)
    assert [reply.status_code for reply in replies] == [200] + [503] * 5
    assert client.get("/livez").status_code == 503


class Leaking(FakeOverlappingRuntime):
    """Gives an overlapping batch the outputs of the batch before it."""

    def __init__(self) -> None:
        super().__init__(num_classes=7)
        self.begun = []

    def begin(self, images, names=None):
        self.begun.append(super().begin(images))
        return self.begun[-2] if len(self.begun) % 2 == 0 else self.begun[-1]


def test_a_runtime_that_mixes_up_batches_is_rejected_by_the_probes():
    images = np.full((2, 32, 32, 3), np.arange(2, dtype=np.uint8)[:, None, None, None])
    runtime = FakeOverlappingRuntime(num_classes=7)
    probes = Probes(images=images, expected=runtime.run(images), tolerance={"logits": 1e-3})
    replay_overlapping(probes, runtime, 2)
    with pytest.raises(ParityError, match="deviates by"):
        replay_overlapping(probes, Leaking(), 2)


def test_an_image_keeps_its_pixels_until_its_batch_ended_whatever_becomes_of_its_neighbours(
    serve_with, make_picture, pool, until
):
    runtime = Held()  # reads its images when the gate opens
    client = serve_with(runtime, decoders=1)
    images = [make_picture(color) for color in COLORS]

    def post(image):
        return client.post("/v1/classify", content=image).json()["classes"]

    runtime.gate.set()
    expected = [post(image) for image in images]
    runtime.gate.clear()
    runtime.entered.clear()
    first = pool.submit(post, images[0])
    assert runtime.entered.wait(60)
    gone = [connect(client) for _ in images]
    for wire, image in zip(gone, images, strict=True):
        wire.sendall(post_of(image))
    others = [pool.submit(post, image) for image in images[1:]]
    until(lambda: count(client, "queue_depth") == 12)
    for wire in gone:
        wire.close()
    until(lambda: count(client, "queue_depth") == 6)
    runtime.gate.set()
    assert [future.result(60) for future in (first, *others)] == expected
