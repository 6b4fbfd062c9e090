"""Cancel the work of a request when its client disconnects."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.inference.results import CLIENT_GONE

Value = TypeVar("Value")


async def cancel_on_disconnect(work: Coroutine[Any, Any, Value], receive: Receive) -> Value:
    """Run *work*; cancel it and raise `RejectedError` (499) if the client disconnects first.

    The request body must have been read: the next message of *receive* is the disconnect.
    """
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("cancel_on_disconnect must run in a task")

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        disconnected = watcher.done() and not watcher.cancelled()
        if not disconnected or task.uncancel():  # cancelled by something else, or additionally
            raise
        raise RejectedError(CLIENT_GONE) from None
    finally:
        watcher.cancel()
