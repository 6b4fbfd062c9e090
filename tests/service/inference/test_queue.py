"""The request queue: when a batch closes, and which images are never part of one."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sopdeploy_service.inference.queue import QueuedImage, RequestQueue, settle
from sopdeploy_service.inference.results import DEADLINE, DRAINING

Fill = Callable[..., list[QueuedImage]]


@pytest.fixture
def fill() -> Iterator[Fill]:
    """`fill(queue, 3)` puts three images into *queue* and returns them."""
    loop = asyncio.new_event_loop()

    def put(queue: RequestQueue, count: int, seconds: float = 60.0) -> list[QueuedImage]:
        deadline = time.monotonic() + seconds
        items = [QueuedImage(outcome=loop.create_future(), deadline=deadline) for _ in range(count)]
        assert all(queue.put(item) for item in items)
        return items

    yield put
    loop.close()


def test_an_idle_worker_takes_what_is_queued_up_to_the_batch_size_in_order(fill: Fill) -> None:
    queue = RequestQueue()
    items = fill(queue, 10)
    assert [queue.take(4), queue.take(4), queue.take(4)] == [items[:4], items[4:8], items[8:]]


def test_a_full_batch_does_not_wait_for_the_delay(fill: Fill) -> None:
    queue = RequestQueue(max_delay=1000)
    assert queue.take_full(4) == []
    items = fill(queue, 4)
    assert queue.take_full(5) == []
    assert queue.take(4) == items


def test_the_delay_starts_with_the_arrival_of_the_oldest_image(fill: Fill) -> None:
    queue = RequestQueue(max_delay=1000)
    items = fill(queue, 2)
    items[0].arrived -= 1000
    assert queue.take(8) == items


def test_images_that_arrive_during_the_delay_join_the_batch(fill: Fill) -> None:
    queue = RequestQueue(max_delay=1000)
    fill(queue, 1)
    late = threading.Timer(0.05, fill, (queue, 2))
    late.start()
    assert len(queue.take(3)) == 3
    late.join()


def test_settled_cancelled_and_expired_images_never_enter_a_batch(fill: Fill) -> None:
    queue = RequestQueue()
    first, cancelled, settled = fill(queue, 3)
    fill(queue, 1, seconds=-1)
    (last,) = fill(queue, 1)
    cancelled.outcome.cancel()
    settle([settled, settled], [DRAINING, DEADLINE])
    assert queue.take(8) == [first, last]
    assert settled.outcome.result() is DRAINING


def test_a_discarded_image_leaves_the_queue_immediately(fill: Fill) -> None:
    queue = RequestQueue()
    items = fill(queue, 2)
    queue.discard(items[0])
    queue.discard(items[0])
    assert len(queue) == 1
    assert queue.take(8) == [items[1]]


def test_a_closed_queue_accepts_nothing_and_returns_the_remaining_images(fill: Fill) -> None:
    queue = RequestQueue()
    items = fill(queue, 2)
    assert queue.close() == items
    assert not queue.put(items[0])
    assert queue.take(8) == []


def test_closing_wakes_a_waiting_worker() -> None:
    queue = RequestQueue()
    closing = threading.Timer(0.05, queue.close)
    closing.start()
    assert queue.take(8) == []
    closing.join()
