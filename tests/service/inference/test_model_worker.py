"""The request queue and the isolation of images that make a batch fail."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from sopdeploy_service.inference.model_worker import QueuedImage, RequestQueue, run_bisected, settle
from sopdeploy_service.inference.results import DEADLINE, DRAINING, INFERENCE_FAILED, NONFINITE

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


RAISES = 13


class Network:
    """Logits are the first pixel; a batch with RAISES raises."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        first = np.array([image[0, 0] for image in images], np.float32)
        if (first == RAISES).any():
            raise RuntimeError("a bad image")
        return {"logits": first}


def images(*first: int) -> list[np.ndarray]:
    return [np.full((2, 2, 3), value, np.uint8) for value in first]


@pytest.mark.parametrize(
    ("size", "bad"), [(1, []), (33, []), (1, [0]), (2, [1]), (7, [3]), (64, [32]), (64, [3, 60])]
)
def test_bad_images_fail_alone_and_a_good_batch_takes_one_run(size: int, bad: list[int]) -> None:
    network = Network()
    values = [RAISES if index in bad else 20 + index for index in range(size)]
    found = run_bisected(network, images(*values), ["logits"])
    assert [index for index, row in enumerate(found) if row is INFERENCE_FAILED] == bad
    good = [index for index in range(size) if index not in bad]
    assert [found[index]["logits"][0] for index in good] == [values[index] for index in good]
    assert (network.runs == 1) == (size == 1 or not bad)


@pytest.mark.parametrize("output", ["logits", "gate"])
def test_an_output_that_is_not_finite_fails_only_its_own_image(output: str) -> None:
    values = {"logits": np.zeros((3, 3), np.float32), "gate": np.zeros((3, 4), np.float32)}
    values[output][1, 2] = np.inf if output == "gate" else np.nan
    found = run_bisected(lambda _: values, images(1, 2, 3), list(values))
    assert [row is NONFINITE for row in found] == [False, True, False]
