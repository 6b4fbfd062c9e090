"""Nothing more is computed for who has hung up: the work of a request ends when its client leaves."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from starlette.types import Receive, Scope

from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.inference.results import CLIENT_GONE

Value = TypeVar("Value")

DEPARTURE = "departure"  # in the state of a scope: that of its connection, if `wire` made it


class Disconnect:
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


async def cancel_on_disconnect(work: Coroutine[Any, Any, Value], scope: Scope, receive: Receive) -> Value:
    """Return what *work* returns; cancel it and raise `RefusedError` where the client leaves before.

    The request's body must have been read. A server that does not tell of a client that leaves, as ours does,
    must be asked by *receive*, which needs a task of its own for every request.
    """
    departure: Disconnect | None = scope["state"].get(DEPARTURE)
    if departure is not None:
        return await unless(departure, work)
    departure = Disconnect()
    asking = asyncio.ensure_future(ask(receive, departure))
    try:
        return await unless(departure, work)
    finally:
        asking.cancel()


async def unless(departure: Disconnect, work: Coroutine[Any, Any, Value]) -> Value:
    """Return what *work* returns; cancel it and raise `RefusedError` where *departure* happens before."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("only a task can be cancelled")
    if departure.happened():
        work.close()
        raise RejectedError(CLIENT_GONE)
    departure.then = task.cancel
    try:
        return await work
    except asyncio.CancelledError:
        if not departure.happened():
            raise
        task.uncancel()
        raise RejectedError(CLIENT_GONE) from None
    finally:
        departure.then = None


async def ask(receive: Receive, departure: Disconnect) -> None:
    """Let *departure* happen when *receive* says so."""
    while (await receive())["type"] != "http.disconnect":
        pass
    departure.happen()


class Begun(Generic[Value]):
    """*work*, begun by the running task: `done`, with its `value`, or in wait for what `waits_for` is.

    What it raises before its first wait is raised here. `await` goes on with it, to its end.
    """

    __slots__ = ("_steps", "done", "value", "waits_for")

    value: Value
    waits_for: Any

    def __init__(self, work: Awaitable[Value]) -> None:
        self.done = False
        self.waits_for = None
        self._steps = work.__await__()
        self._go(self._steps.send, None)

    def __await__(self) -> Generator[Any, Any, Value]:
        while not self.done:
            try:
                yield self.waits_for
            except BaseException as problem:  # as for any coroutine, a cancellation is thrown in here
                self._go(self._steps.throw, problem)
            else:
                self._go(self._steps.send, None)
        return self.value

    def _go(self, step: Callable[[Any], Any], given: BaseException | None) -> None:
        try:
            self.waits_for = step(given)
        except StopIteration as end:
            self.done = True
            self.value = end.value
