"""Estimates of waiting times: medians of recent work, which no stall and no deadline can keep too high."""

import time

import pytest

from sopdeploy_service.decoding.pool import Request
from sopdeploy_service.inference import pace, results
from sopdeploy_service.inference.pace import BatchPace, Pace, retry_after
from sopdeploy_service.inference.request_queue import QueuedImage, RequestQueue
from sopdeploy_service.inference.shared_children import SharedChildren
from sopdeploy_service.observability.metrics import Metrics

BATCHES = {
    "no warm-up": ((), 8, 0.0),
    "measured": (((1, 0.1), (8, 0.5)), 8, 0.5),
    "the fastest of a size": (((8, 9.0), (8, 0.5)), 8, 0.5),
    "between two sizes": (((2, 0.2), (4, 0.4)), 3, 0.3),
    "below the smallest": (((4, 0.4),), 1, 0.4),
    "above the largest": (((4, 0.4),), 8, 0.8),
}


@pytest.mark.parametrize(("measured", "size", "seconds"), BATCHES.values(), ids=BATCHES)
def test_a_batch_takes_as_long_as_measured(measured, size, seconds):
    assert BatchPace(measured).batch_seconds(size) == pytest.approx(seconds)


def test_a_slow_batch_slows_all_sizes_and_a_stall_none():
    batches = BatchPace([(1, 0.1), (4, 0.4)])
    for _ in range(pace.NUM_RECENT):
        batches.record(1, 0.2)
    assert batches.batch_seconds(4) == pytest.approx(0.8)
    assert batches.total_seconds(9, 4) == pytest.approx(0.8 + 0.8 + 0.2)

    batches.record(4, 180.0)
    assert batches.batch_seconds(4) == pytest.approx(0.8)


@pytest.mark.parametrize(("seconds", "header"), [(0.01, 1), (2.1, 3), (1e6, 60)])
def test_the_advice_when_to_retry_is_a_whole_number_of_seconds(seconds, header):
    assert retry_after(results.QUEUE_FULL, seconds).retry_after == header


# seconds that are left for each image; a batch of up to two takes 1 s; images of the batch
QUEUES = {
    "all in time": ([5, 5], [0, 1]),
    "the first is late anyway": ([0.5, 5, 5], [1, 2]),
    "all are late": ([0.5, 0.5], [0, 1]),
}


@pytest.mark.parametrize(("left", "taken"), QUEUES.values(), ids=QUEUES)
def test_a_batch_skips_images_that_it_answers_too_late_unless_alone(clock, left, taken):
    queue = RequestQueue(batch_seconds=lambda _: 1.0)
    images = [QueuedImage(None, clock.time + seconds, lambda _: None) for seconds in left]  # type: ignore[arg-type]
    for image in images:
        queue.put(image)

    assert [images.index(image) for image in queue.take(2)] == taken


class Child:
    """A decoder process that keeps its requests; the test says when it has decoded one."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def run(self, request: Request) -> None:
        request.began = time.monotonic()
        self.requests.append(request)


class Outcome(list):
    """In place of a future: what it was settled with."""

    def done(self) -> bool:
        return bool(self)

    set_result = list.append

    def add_done_callback(self, _: object) -> None:
        """Call nothing: requests that are settled are passed over."""


def request_until(latest: float, work: float = 1.0) -> Request:
    return Request(b"", b"", 0, range(0), Outcome(), work=work, latest=latest)  # type: ignore[arg-type]


@pytest.fixture
def children(clock):
    """One child at the pace of 1, with a request of one second that it has begun."""
    shared = SharedChildren(Metrics())
    shared.pace = Pace()
    child = Child()
    shared.give_work(child)  # type: ignore[arg-type]
    shared.put(request_until(clock.time + 1), None)
    return shared, child


# seconds left when an image arrives behind others of one second each; is it refused, and until when
ARRIVALS = {
    "room for all": (0, 1.6, None),
    "what runs is half done": (0, 1.4, 1),
    "others wait": (3, 4.6, None),
    "too many others wait": (3, 2.0, 3),
}


@pytest.mark.parametrize(("waiting", "left", "again"), ARRIVALS.values(), ids=ARRIVALS)
def test_an_image_is_refused_at_once_without_time_to_decode_it(
    clock, children, monkeypatch, waiting, left, again
):
    monkeypatch.setattr(pace, "MARGIN", 1.0)
    shared, _ = children
    for _ in range(waiting):
        shared.put(request_until(clock.time + 99), None)

    late = request_until(clock.time + left)
    shared.put(late, None)
    assert late.result == ([] if again is None else [retry_after(results.TOO_LATE, again)])


# seconds until the images that wait are late, after a delay of 10 s; which one is decoded
SKIPPED = {
    "all in time": ([99, 99], 0),
    "the first is late anyway": ([10.5, 99], 1),
    "all are late": ([10.5, 10.6], 0),
    "none waits": ([], None),
}


@pytest.mark.parametrize(("until", "decoded"), SKIPPED.values(), ids=SKIPPED)
def test_a_decoder_skips_what_cannot_be_in_time_unless_alone(clock, children, until, decoded):
    shared, child = children
    waiting = [request_until(clock.time + seconds) for seconds in until]
    for request in waiting:
        shared.put(request, None)

    clock.time += 10.0
    first = child.requests.pop()
    shared.pace.record = lambda *_: None  # type: ignore[method-assign]
    shared.finish(child, first, True)  # type: ignore[arg-type]
    assert child.requests == ([] if decoded is None else [waiting[decoded]])


def test_after_a_stall_of_everything_an_image_is_decoded_as_before(clock, children):
    shared, child = children
    for seconds in (1, 1, 180, 1):
        clock.time += seconds
        shared.finish(child, child.requests.pop(), True)  # type: ignore[arg-type]
        shared.put(request_until(clock.time + 5), None)
        second = request_until(clock.time + 2)
        shared.put(second, None)
        assert second.result == []
        second.result.append("over")
