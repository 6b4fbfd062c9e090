"""The request queue: when a batch closes, and which images are never part of one."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sopdeploy_service.inference.model_worker import QueuedImage, RequestQueue, settle
from sopdeploy_service.inference.results import DEADLINE, DRAINING

Fill = Callable[..., list[QueuedImage]]


@pytest.fixture
def fill() -> Iterator[Fill]:
    """`fill(queue, 3)` puts three images into *queue* and returns them."""
    loop = asyncio.new_event_loop()

    def put(queue: RequestQueue, count: int, seconds: float = 60.0) -> list[QueuedImage]:
        deadline = time.monotonic() + seconds
        items = [QueuedImage(outcome=loop.create_future(), deadline=deadline) for _ in range(count)]
        assert {queue.put(item) for item in items} == {None}
        return items

    yield put
    loop.close()


def test_an_idle_worker_takes_what_is_queued_up_to_the_batch_size_in_order(fill: Fill) -> None:
    queue = RequestQueue()
    items = fill(queue, 10)
    assert [queue.take(4), queue.take(4), queue.take(4)] == [items[:4], items[4:8], items[8:]]


def test_a_full_batch_does_not_wait_for_the_delay_of_the_oldest_image(fill: Fill) -> None:
    queue = RequestQueue(max_delay=1000)
    assert queue.take(4, only_full=True) == []
    items = fill(queue, 4)
    assert queue.take(5, only_full=True) == []
    assert queue.take(2, only_full=True) == items[:2]
    assert queue.take(2) == items[2:]
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


def test_settled_cancelled_rejected_and_expired_images_never_enter_a_batch(fill: Fill) -> None:
    queue = RequestQueue()
    first, cancelled, settled, rejected = fill(queue, 4)
    fill(queue, 1, seconds=-1)
    (last,) = fill(queue, 1)
    cancelled.outcome.cancel()
    settle([settled, settled], [DRAINING, DEADLINE])
    for _ in range(2):
        queue.reject([rejected, settled], DEADLINE)
    assert queue.take(8) == [first, last]
    assert (settled.outcome.result(), rejected.outcome.result()) == (DRAINING, DEADLINE)


def test_a_closed_queue_accepts_nothing_and_returns_the_remaining_images(fill: Fill) -> None:
    queue = RequestQueue()
    items = fill(queue, 2)
    assert queue.close(DRAINING) == items
    assert queue.put(items[0]) is DRAINING
    assert queue.take(8) == []


def test_closing_wakes_a_waiting_worker() -> None:
    queue = RequestQueue()
    closing = threading.Timer(0.05, queue.close, [DRAINING])
    closing.start()
    assert queue.take(8) == []
    closing.join()
