"""Something to await that has gone as far as it could without waiting; most of a request never waits.

A body that is here already needs no clock, and who only watches for a client to leave needs no task.
"""

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


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
