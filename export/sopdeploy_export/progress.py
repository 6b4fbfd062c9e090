"""Progress: what an export is doing, told to whoever asked for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Step = Callable[[str], None]

_listener: ContextVar[Step | None] = ContextVar("_listener", default=None)


@contextmanager
def reporting(listener: Step) -> Iterator[None]:
    """Tell *listener* what `step` describes in the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def step(text: str) -> None:
    """Describe the step that begins."""
    if listener := _listener.get():
        listener(text)
