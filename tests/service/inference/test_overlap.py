"""A device that can hold two batches is given the next one before it has ended the one before."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sopdeploy_service.runtime.base import DeviceLostError, OutOfMemoryError
from sopdeploy_service.runtime.fake import FakeOverlappingRuntime

LARGEST = 2
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10), (10, 250, 250), (250, 10, 250)]


class Scripted(FakeOverlappingRuntime):
    """Notes what happens in which order; a batch ends when `gate` is set, and fails as *problems* say.

    *problems* has an exception by the number of a batch and where it shows: 0 where it begins, 1 at its end.
    """

    def __init__(self, problems=None) -> None:
        super().__init__(classes=7, largest_batch=LARGEST)
        self.problems = problems or {}
        self.gate = threading.Event()
        self.told: list[str] = []

    def begin(self, images):
        number = len(self.batches) + 1
        self.told.append(f"begin {number}")
        wait = super().begin(images)
        if problem := self.problems.get((number, 0)):
            raise problem

        def end():
            self.told.append(f"wait {number}")
            self.gate.wait(20)
            if problem := self.problems.get((number, 1)):
                raise problem
            return wait()

        return end


@pytest.fixture
def pool():
    with ThreadPoolExecutor(24) as pool:
        yield pool


@pytest.fixture
def ask(serve_with, make_picture, pool, until):
    """`ask(runtime, 5)` sends so many pictures, one alone and then the others at once; gives the replies."""

    def post(client, picture):
        return client.post("/v1/classify?top_k=1", content=picture)

    def send(runtime, count):
        client = serve_with(runtime, decoders=1)
        pictures = [make_picture(colour) for colour in COLOURS[:count]]
        futures = [pool.submit(post, client, pictures[0])]
        until(lambda: "wait 1" in runtime.told)
        line = client.app.state.service.registry.find().queue
        for place, picture in enumerate(pictures[1:]):  # so that they stand in this order
            futures.append(pool.submit(post, client, picture))
            until(lambda place=place: len(line) > place)
        runtime.gate.set()
        return [future.result(20) for future in futures], client

    return send


def test_a_full_batch_is_begun_while_another_is_at_work_and_one_that_is_not_stays(ask):
    runtime = Scripted()
    replies, _ = ask(runtime, 6)
    assert [reply.status_code for reply in replies] == [200] * 6
    assert runtime.batches == [1, 2, 2, 1]
    assert runtime.told[:2] == ["begin 1", "wait 1"]
    assert runtime.told[2:] == ["begin 2", "begin 3", "wait 2", "wait 3", "begin 4", "wait 4"]


def test_every_answer_is_that_of_its_own_picture(serve_with, make_picture, pool):
    client = serve_with(FakeOverlappingRuntime(classes=3, fixed_ms=2, largest_batch=4))
    pictures = {place: make_picture(colour) for place, colour in enumerate(COLOURS[:3])}

    def best(place: int) -> bool:
        reply = client.post("/v1/classify?top_k=1", content=pictures[place]).json()
        return reply["classes"][0]["label"] == ["ant", "bee", "cat"][place]

    assert all(pool.map(best, [number % 3 for number in range(240)]))
    assert max(client.app.state.service.registry.find().loaded.runtime.batches) == 4


@pytest.mark.parametrize("where", [0, 1], ids=["where it begins", "at its end"])
@pytest.mark.parametrize("number", [2, 3])
def test_a_batch_that_fails_is_run_again_in_halves_and_its_neighbours_are_untouched(ask, number, where):
    runtime = Scripted({(number, where): RuntimeError("once")})
    replies, _ = ask(runtime, 5)
    assert [reply.status_code for reply in replies] == [200] * 5
    assert sorted(runtime.batches) == [1, 1, 1, 2, 2]


def test_a_device_without_memory_gets_halves(ask):
    runtime = Scripted({(2, 1): OutOfMemoryError("no memory")})
    replies, client = ask(runtime, 5)
    assert [reply.status_code for reply in replies] == [200] * 5
    assert client.app.state.service.registry.find()._worker._limit == 1


def test_a_lost_device_answers_both_batches_and_everything_behind(ask):
    runtime = Scripted({(2, 1): DeviceLostError("gone")})
    replies, client = ask(runtime, 6)
    assert [reply.status_code for reply in replies] == [200] + [503] * 5
    assert client.get("/livez").status_code == 503


def test_a_device_is_busy_from_one_batch_to_the_next(serve_with, jpeg, pool):
    client = serve_with(FakeOverlappingRuntime(classes=7, fixed_ms=10, per_image_ms=1, largest_batch=4))
    replies = list(pool.map(lambda _: client.post("/v1/classify", content=jpeg), range(200)))
    spans = client.app.state.service.metrics.of("tiny").busy._spans
    assert all(reply.status_code == 200 for reply in replies)
    assert all(before[1] <= after[0] for before, after in zip(spans, list(spans)[1:], strict=False))
