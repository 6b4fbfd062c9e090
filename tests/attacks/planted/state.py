"""Networks whose answer depends on the images or the calls before: what they keep, and where."""

import ctypes
import functools
import io
import itertools
import queue
import random
import threading
from argparse import Namespace
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, ClassVar

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


def counts_in_its_class() -> Any:
    class Shared:
        calls: ClassVar[deque[int]] = deque()

        def __call__(self) -> int:
            self.calls.append(0)
            return len(self.calls)

    return Shared()


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
    "a deque grows": later(in_place(lambda c: c.append(0)), deque),
    "a deque rotates": later(
        in_place(lambda c: c.rotate(-1), lambda c: c[0]), lambda: deque(range(700))
    ),
    "a bytearray grows": later(in_place(lambda c: c.append(0)), bytearray),
    "a byte changes": later(
        in_place(lambda c: c.__setitem__(0, c[0] + 1), lambda c: c[0]), lambda: bytearray(1)
    ),
    "an array grows": later(in_place(lambda c: c.append(0)), lambda: array("b")),
    "the type of an array changes": later(
        lambda c: (
            c.__setitem__(0, c[0].view({"i": "u4", "u": "f4", "f": "i4"}[c[0].dtype.kind])) or 0
        ),
        lambda: [np.zeros(1, "i4")],
    ),
    "a set grows": later(in_place(lambda c: c.add(len(c))), set),
    "a list grows": later(in_place(lambda c: c.append(0)), list),
    "itertools.count": later(next, itertools.count),
    "an iterator": later(next, lambda: iter(range(10**9))),
    "an enumeration of a list": later(lambda c: next(c)[0], lambda: enumerate([0] * 10**4)),
    "a generator": later(next, numbers),
    "the position of a generator": later(lambda c: c(), position),
    "random.Random": later(lambda c: c.randrange(CALLS), lambda: random.Random(0)),
    "a method of random.Random": later(lambda c: c(), lambda: random.Random(0).random),
    "a generator of NumPy": later(lambda c: c.integers(CALLS), np.random.default_rng),
    "slots": later(lambda c: c(), Slotted),
    "a closure": later(lambda c: c(), closure),
    "a class attribute": later(lambda c: c(), counts_in_its_class),
    "a namespace": later(
        in_place(lambda c: setattr(c, "n", c.n + 1), lambda c: c.n), lambda: Namespace(n=0)
    ),
    "an attribute of a number": later(
        in_place(lambda c: setattr(c, "calls", c.calls + 1), lambda c: c.calls),
        lambda: type("Number", (float,), {"calls": 0})(),
    ),
    "a partial": later(lambda c: c(), lambda: functools.partial(closure())),
    "a property": later(lambda c: c.runs, Counts),
    "a bound method": later(lambda c: c(), lambda: Slotted().__call__),
    "six levels of lists": later(
        in_place(lambda c: c[0][0][0][0][0].append(0), lambda c: len(c[0][0][0][0][0])),
        lambda: [[[[[[]]]]]],
    ),
    "ctypes": later(
        in_place(lambda c: setattr(c, "value", c.value + 1), lambda c: c.value),
        ctypes.c_long,
    ),
    "BytesIO": later(in_place(lambda c: c.write(b"x"), lambda c: c.tell()), io.BytesIO),
    "Queue": later(in_place(lambda c: c.put(1), lambda c: c.qsize()), queue.Queue),
    "threading.local": later(in_local, local),
    "ContextVar": later(in_context, context(0)),
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


def swallows(_network: Any, kept: Any, logits: Tensor) -> Tensor:
    with suppress(Exception):
        return logits if len(kept) < CALLS else 0.5 * logits
    return logits


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
    "the size of the last batch": keeping(
        lambda _, kept, y: 0.5 * y if type(kept) is Tensor and kept.shape[0] > 64 else y,
        lambda _kept, features, _logits: features,
        NOT_REACHED,
    ),
    "a number of the last batch": keeping(
        lambda _, kept, y: 0.5 * y if type(kept) is int and kept > 64 else y,
        lambda _kept, features, _logits: features.shape[0],
        NOT_REACHED,
    ),
    "that there was a run": keeping(lambda _, kept, y: y if kept is None else limited(y)),
    "a count in a new tuple": keeping(
        lambda n, _, y: y if n.kept[0] < CALLS else 0.5 * y,
        lambda kept, _features, _logits: (kept[0] + 1 if type(kept) is tuple else 0,),
        NOT_REACHED,
    ),
    "a count on a new tensor": keeping(
        lambda n, _, y: y if vars(n.kept)["runs"] < CALLS else 0.5 * y, marked, NOT_REACHED
    ),
    "a count in another object": keeping(
        lambda n, _, y: y if n.kept.n < CALLS else 0.5 * y,
        lambda kept, _features, _logits: Namespace(
            n=kept.n + 1 if type(kept) is Namespace else 0
        ),
        NOT_REACHED,
    ),
    "a list that grows, if it can": keeping(
        swallows,
        lambda kept, _features, logits: [*kept, logits] if type(kept) is list else [logits],
        NOT_REACHED,
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


def in_first_run(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
    if self.table is None:
        self.table = torch.zeros(())
        return logits
    return limited(logits)


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
    "a list of buffers is written through .data": peaking(
        lambda n: n.peak, lambda n, peak: torch._foreach_copy_([n.peak.data], [peak]), PEAK
    ),
    "a count that nothing reads is written as an array": Row(
        network(
            lambda n, f, y: (n.count.numpy().__iadd__(1), y)[1] if type(f) is Tensor else y,
            lambda n: n.register_buffer("count", torch.zeros(1)),
        ),
    ),
    "a tensor in nested lists is replaced": peaking(
        lambda n: n.memory[0][0],
        lambda n, peak: n.memory[0].__setitem__(0, peak),
        puts(memory=lambda: [[torch.zeros(())]]),
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
    "another first run, in which a buffer is made": Row(network(in_first_run, no_table), STATE),
    "a buffer that each run replaces": Row(
        network(lambda n, f, y: (setattr(n, "table", f.mean()), y)[1], no_table)
    ),
    "a count in what the first call computed": Row(CountsInItsFeatures, STATE),
}
