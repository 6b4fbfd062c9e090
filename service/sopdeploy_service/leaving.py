"""Nothing more is computed for who has hung up: the work of a request ends when its client leaves."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope

from sopdeploy_service.outcome import CLIENT_GONE
from sopdeploy_service.problems import RefusedError

Value = TypeVar("Value")

DEPARTURE = "departure"  # in the state of a scope: that of its connection, if `wire` made it


class Departure:
    """The moment when a client leaves; used on the event loop only."""

    def __init__(self) -> None:
        self._happened = False
        self.then: Callable[[], object] | None = None  # called when it happens

    def happened(self) -> bool:
        """Return whether the client has left."""
        return self._happened

    def happen(self) -> None:
        """Say that the client has left."""
        self._happened = True
        if self.then is not None:
            self.then()


async def unless_gone(work: Coroutine[Any, Any, Value], scope: Scope, receive: Receive) -> Value:
    """Return what *work* returns; cancel it and raise `RefusedError` where the client leaves before.

    The request's body must have been read. A server that does not tell of a client that leaves, as ours does,
    must be asked by *receive*, which needs a task of its own for every request.
    """
    departure: Departure | None = scope["state"].get(DEPARTURE)
    if departure is not None:
        return await unless(departure, work)
    departure = Departure()
    asking = asyncio.ensure_future(ask(receive, departure))
    try:
        return await unless(departure, work)
    finally:
        asking.cancel()


async def unless(departure: Departure, work: Coroutine[Any, Any, Value]) -> Value:
    """Return what *work* returns; cancel it and raise `RefusedError` where *departure* happens before."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("only a task can be cancelled")
    if departure.happened():
        work.close()
        raise RefusedError(CLIENT_GONE)
    departure.then = task.cancel
    try:
        return await work
    except asyncio.CancelledError:
        if not departure.happened():
            raise
        task.uncancel()
        raise RefusedError(CLIENT_GONE) from None
    finally:
        departure.then = None


async def ask(receive: Receive, departure: Departure) -> None:
    """Let *departure* happen when *receive* says so."""
    while (await receive())["type"] != "http.disconnect":
        pass
    departure.happen()
