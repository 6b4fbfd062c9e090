"""The waiting line: when a batch closes, and who is never in one."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from sopdeploy_service.inference.queue import QueuedImage, RequestQueue
from sopdeploy_service.inference.results import DRAINING


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def item(loop: asyncio.AbstractEventLoop, *, seconds: float = 60.0) -> QueuedImage:
    return QueuedImage(outcome=loop.create_future(), deadline=time.monotonic() + seconds)


def fill(line: RequestQueue, items: list[QueuedImage]) -> list[QueuedImage]:
    assert all(line.put(entry) for entry in items)
    return items


def test_an_idle_engine_takes_at_once_what_is_there(loop) -> None:
    line = RequestQueue()
    items = fill(line, [item(loop) for _ in range(3)])
    assert line.take(8) == items


def test_a_batch_is_never_larger_than_asked_and_keeps_the_order(loop) -> None:
    line = RequestQueue()
    items = fill(line, [item(loop) for _ in range(10)])
    assert [line.take(4), line.take(4), line.take(4)] == [items[:4], items[4:8], items[8:]]


def test_the_delay_is_counted_from_the_oldest_item(loop) -> None:
    line = RequestQueue(max_delay=30)
    oldest, youngest = item(loop), item(loop)
    oldest.arrived -= 29.8
    fill(line, [oldest, youngest])
    started = time.monotonic()
    assert len(line.take(8)) == 2
    assert 0.1 < time.monotonic() - started < 15


def test_a_full_batch_does_not_wait_for_the_delay(loop) -> None:
    line = RequestQueue(max_delay=30)
    items = fill(line, [item(loop) for _ in range(4)])
    assert line.take(4) == items


def test_items_that_come_during_the_delay_join_the_batch(loop) -> None:
    line = RequestQueue(max_delay=20)
    fill(line, [item(loop)])
    late = threading.Timer(0.05, fill, (line, [item(loop), item(loop)]))
    late.start()
    assert len(line.take(3)) == 3
    late.join()


def test_cancelled_and_expired_items_never_enter_a_batch(loop) -> None:
    line = RequestQueue()
    items = fill(line, [item(loop), item(loop), item(loop, seconds=-1), item(loop)])
    items[1].outcome.cancel()
    assert line.take(8) == [items[0], items[3]]


def test_a_discarded_item_frees_its_place_at_once(loop) -> None:
    line = RequestQueue()
    items = fill(line, [item(loop), item(loop)])
    line.discard(items[0])
    line.discard(items[0])
    assert len(line) == 1
    assert line.take(8) == [items[1]]


def test_a_closed_line_lets_nothing_in_and_gives_back_the_rest(loop) -> None:
    line = RequestQueue()
    items = fill(line, [item(loop), item(loop)])
    assert list(line.close()) == items
    assert not line.put(item(loop))
    assert line.take(8) == []


def test_closing_wakes_an_engine_that_waits(loop) -> None:
    line = RequestQueue()
    closing = threading.Timer(0.05, line.close)
    closing.start()
    assert line.take(8) == []
    closing.join()


def test_an_item_with_an_outcome_is_not_wanted(loop) -> None:
    done = item(loop)
    done.outcome.set_result(DRAINING)
    assert not done.wanted(time.monotonic())
