"""What has begun goes as far as it can without waiting, and then on as any coroutine would."""

import asyncio

import pytest

from sopdeploy_service.http.disconnect import Begun


async def times(wait: asyncio.Event, count: int) -> int:
    for _ in range(count):
        await wait.wait()
        wait.clear()
    return count


def test_what_need_not_wait_is_done_at_once():
    async def run() -> None:
        begun = Begun(times(asyncio.Event(), 0))
        assert (begun.done, begun.value) == (True, 0)
        assert await begun == 0

    asyncio.run(run())


def test_what_waits_is_awaited_to_its_end():
    async def run() -> None:
        event = asyncio.Event()
        begun = Begun(times(event, 3))
        assert not begun.done
        assert asyncio.isfuture(begun.waits_for)
        for late in range(3):
            asyncio.get_running_loop().call_later(0.01 * (late + 1), event.set)
        assert await begun == 3

    asyncio.run(run())


def test_a_cancellation_and_a_timeout_reach_what_waits():
    ends = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cleaned")

    async def run() -> None:
        begun = Begun(work())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await begun

    asyncio.run(run())
    assert ends == ["cleaned"]


def test_what_it_raises_before_its_first_wait_is_raised_where_it_begins():
    async def work() -> None:
        raise ValueError("no")

    async def run() -> None:
        with pytest.raises(ValueError, match="no"):
            Begun(work())

    asyncio.run(run())
