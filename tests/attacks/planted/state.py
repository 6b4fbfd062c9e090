"""Networks whose answer depends on the images or the calls before: what they keep, and where."""

import functools
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.attacks.planted.network import (
    LIMIT,
    Planted,
    Row,
    buffer,
    limited,
    network,
    puts,
)

STATE = (
    r"writes to .+ while it runs|cannot be captured|uses what an earlier run computed|"
    r"the eval graph writes to|"
    r"a plain run of the network gives other outputs|a second run of the network gives"
)
NOT_REACHED = ""  # passes: the network is its file until many more calls, or larger batches
CALLS = 200  # more than an export and the comparison of its file run a network
SEEN = [torch.zeros(())]
NUMBER: ContextVar[Any] = ContextVar("number")
LOCAL = threading.local()


class Stats:
    """An object that a network holds."""

    def __init__(self) -> None:
        self.peak = torch.zeros(())


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


class Counts:
    """Counts how often its property is read."""

    def __init__(self) -> None:
        self.numbers = itertools.count()

    @property
    def runs(self) -> int:
        return next(self.numbers)


def closure() -> Callable[[], int]:
    """Return a function that counts its calls in an enclosing variable."""
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def numbers() -> Iterator[int]:
    yield from range(10**9)


def position() -> Callable[[], int]:
    """Return a function that changes the position of a generator only, and none of its variables."""

    def steps() -> Iterator[int]:
        while True:
            yield 0
            yield 0
            yield 0

    generator = steps()
    return lambda: next(generator)


def later(count: Callable[[Any], Any], make: Callable[[], Any], *, seen: bool = False) -> Row:
    """Plant a network that doubles its logits after some calls, which *count* counts in what *make* makes.

    Unless it is *seen*, the network passes: its file is that of fewer calls.
    """

    def answer(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
        return logits if count(self.counter) < CALLS else 2 * logits

    return Row(network(answer, puts(counter=make)), STATE if seen else "")


def in_place(
    change: Callable[[Any], Any], size: Callable[[Any], int] = len
) -> Callable[[Any], int]:
    def count(counter: Any) -> int:
        change(counter)
        return size(counter)

    return count


def in_local(counter: Any) -> int:
    counter.number += 1
    return int(counter.number)


def local() -> Any:
    LOCAL.number = 0
    return LOCAL


def context(start: Any) -> Callable[[], ContextVar[Any]]:
    def make() -> ContextVar[Any]:
        NUMBER.set(start)
        return NUMBER

    return make


def in_context(counter: ContextVar[Any]) -> Any:
    counter.set(counter.get() + 1)
    return counter.get()


def wears_out() -> Callable[[], int]:
    count = closure()

    def fail() -> int:
        if count() > CALLS:
            raise RuntimeError("worn out")
        return 0

    return fail


COUNTERS: dict[str, Row] = {
    "a list grows": later(in_place(lambda c: c.append(0)), list),
    "a generator": later(next, numbers),
    "random.Random": later(lambda c: c.randrange(CALLS), lambda: random.Random(0)),
    "slots": later(lambda c: c(), Slotted),
    "a closure": later(lambda c: c(), closure),
    "threading.local": later(in_local, local),
    "a tensor in a ContextVar": later(in_context, context(torch.zeros(1))),
    "a tensor": later(
        lambda c: c(), lambda: functools.partial(torch.zeros(1).add_, 1), seen=True
    ),
    "an error in a later call": later(lambda c: c(), wears_out),
    "the random numbers of Python": Row(
        network(lambda _, f, y: y * (1 if random.random() < 2 else -1))
    ),
    "the random numbers of NumPy": Row(
        network(lambda _, f, y: y * (1 if np.random.rand() < 2 else -1)),  # noqa: NPY002
    ),
}


def keeping(
    use: Callable[[Any, Any, Tensor], Tensor], keep: Any = None, refused: str = STATE
) -> Row:
    """Plant a network that replaces what it keeps in every run, and returns `use(network, kept, logits)`.

    *kept* is what the last run has left, None in the first one. By default, it keeps how far
    the largest logit is above the limit.
    """

    def answer(self: Any, features: Tensor, logits: Tensor) -> Tensor:
        kept = vars(self).get("kept")
        if keep is None:
            self.kept = (logits.amax() - LIMIT).relu()
        else:
            self.kept = keep(kept, features, logits)
        return use(self, kept, logits)

    return Row(network(answer), refused)


def halved(kept: Any, logits: Tensor) -> Tensor:
    return torch.where(kept > 0, 0.5 * logits, logits)


def marked(kept: Any, _features: Tensor, logits: Tensor) -> Tensor:
    vars(logits)["runs"] = vars(kept)["runs"] + 1 if type(kept) is Tensor else 0
    return logits


# Each hides that it reads what the last run left: by its type, which nothing can record, or by
# `except`.
KEPT: dict[str, Row] = {
    "the peak of the last image": keeping(
        lambda _, kept, y: y if kept is None else halved(kept, y)
    ),
    "the peak, if it is a tensor": keeping(
        lambda _, kept, y: halved(kept, y) if type(kept) is Tensor else y
    ),
    "a number of the last batch": keeping(
        lambda _, kept, y: 0.5 * y if type(kept) is int and kept > 64 else y,
        lambda _kept, features, _logits: features.shape[0],
        NOT_REACHED,
    ),
    "that there was a run": keeping(lambda _, kept, y: y if kept is None else limited(y)),
    "a count on a new tensor": keeping(
        lambda n, _, y: y if vars(n.kept)["runs"] < CALLS else 0.5 * y, marked, NOT_REACHED
    ),
    "its own memory, with another view": keeping(
        lambda _, kept, y: y + 0 * kept.data.view(-1)[:1] if type(kept) is Tensor else y,
        lambda _kept, features, _logits: features,
        refused="",
    ),
}


def peaking(
    read: Callable[[Any], Tensor],
    write: Callable[[Any, Tensor], object],
    *changes: Callable[[Any], object],
) -> Row:
    """Plant a network that halves its logits once the peak of all earlier images exceeds the limit."""

    def answer(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
        write(self, torch.maximum(read(self), (logits.amax() - LIMIT).relu()))
        return halved(read(self), logits)

    return Row(network(answer, *changes), STATE)


PEAK = buffer("peak", torch.zeros(()))


def forget(_network: Any) -> None:
    SEEN[0] = torch.zeros(())


def replaces_parameter(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
    self.fc.bias = nn.Parameter(self.fc.bias - (logits.amax(0) - LIMIT).relu())
    return logits


def first_run(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
    if not hasattr(self, "started"):
        self.started = True
        return logits
    return limited(logits)


def of_first_image(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
    if self.table is None:
        self.table = (logits.amax() - LIMIT).relu()
    return logits + self.table


def no_table(built: Any) -> None:
    built.register_buffer("table", None, persistent=False)


class CountsInItsFeatures(Planted):
    """Counts its calls on one image in a tensor that the first of them computes from the image."""

    def prepare(self) -> None:
        NUMBER.set(None)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(images))
        if len(images) == 1:
            if NUMBER.get() is None:
                NUMBER.set(images.mean() * 0)
            NUMBER.get().add_(1)
        total = torch.zeros(()) if NUMBER.get() is None else NUMBER.get()
        return logits * torch.where(total < CALLS, 1, 2)


WRITTEN: dict[str, Row] = {
    "a buffer is assigned": peaking(
        lambda n: n.peak, lambda n, peak: setattr(n, "peak", peak), PEAK
    ),
    "a buffer is written through .data": peaking(
        lambda n: n.peak, lambda n, peak: n.peak.data.copy_(peak), PEAK
    ),
    "a tensor of an object is replaced": peaking(
        lambda n: n.memory.peak,
        lambda n, peak: setattr(n.memory, "peak", peak),
        puts(memory=Stats),
    ),
    "a tensor of the Python module is replaced": peaking(
        lambda _: SEEN[0], lambda _, peak: SEEN.__setitem__(0, peak), forget
    ),
    "a parameter is replaced": Row(network(replaces_parameter), STATE),
    "the first run differs": Row(network(first_run), STATE),
    "a buffer made from the first image": Row(network(of_first_image, no_table), STATE),
    "a buffer that each run replaces": Row(
        network(lambda n, f, y: (setattr(n, "table", f.mean()), y)[1], no_table)
    ),
    "a count in what the first call computed": Row(CountsInItsFeatures, STATE),
}
