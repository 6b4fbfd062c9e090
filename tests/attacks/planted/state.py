"""Networks whose answer depends on the images or the calls before: what they keep, and where."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from tests.attacks.planted.network import (
    LIMIT,
    Change,
    Planted,
    Row,
    buffer,
    network,
    puts,
)

NOT_REACHED = ""  # passes: the network is its file until many more calls, or larger batches
CALLS = 200  # more than an export and the comparison of its file run a network
NUMBER: ContextVar[Any] = ContextVar("number")


class Stats:
    """An object that a network holds."""

    def __init__(self) -> None:
        self.peak = torch.zeros(())


def closure() -> Callable[[], int]:
    """Return a function that counts its calls in an enclosing variable."""
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def later(count: Callable[[Any], Any], make: Callable[[], Any], refused: str) -> Row:
    """Plant a network that doubles its logits after some calls, which *count* counts in what *make* makes."""

    def answer(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
        return logits if count(self.counter) < CALLS else 2 * logits

    return Row(network(answer, puts(counter=make)), refused)


def grows(counter: list[int]) -> int:
    counter.append(0)
    return len(counter)


COUNTERS: dict[str, Row] = {
    "a list grows": later(grows, list, NOT_REACHED),
    "a tensor": later(
        lambda c: c(), lambda: functools.partial(torch.zeros(1).add_, 1), "cannot be captured"
    ),
}


def halved(kept: Any, logits: Tensor) -> Tensor:
    return torch.where(kept > 0, 0.5 * logits, logits)


def keeps_peak(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
    """Halve the logits if one of the last run was above the limit."""
    kept = vars(self).get("kept")
    self.kept = (logits.amax() - LIMIT).relu()
    return logits if kept is None else halved(kept, logits)


def keeps_size(self: Any, features: Tensor, logits: Tensor) -> Tensor:
    """Halve the logits after a large batch."""
    kept = vars(self).get("kept")
    self.kept = features
    return 0.5 * logits if type(kept) is Tensor and kept.shape[0] > 64 else logits


KEPT: dict[str, Row] = {
    "the peak of the last image": Row(network(keeps_peak), "a plain run of the network gives"),
    "the size of the last batch": Row(network(keeps_size), NOT_REACHED),
}


def peaking(
    read: Callable[[Any], Tensor],
    write: Callable[[Any, Tensor], object],
    change: Change,
    refused: str,
) -> Row:
    """Plant a network that halves its logits once the peak of all earlier images exceeds the limit."""

    def answer(self: Any, _features: Tensor, logits: Tensor) -> Tensor:
        write(self, torch.maximum(read(self), (logits.amax() - LIMIT).relu()))
        return halved(read(self), logits)

    return Row(network(answer, change), refused)


PEAK = buffer("peak", torch.zeros(()))


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
        lambda n: n.peak, lambda n, peak: setattr(n, "peak", peak), PEAK, "writes to peak"
    ),
    "a buffer is written through .data": peaking(
        lambda n: n.peak,
        lambda n, peak: n.peak.data.copy_(peak),
        PEAK,
        "in a write through .data",
    ),
    "a tensor of an object is replaced": peaking(
        lambda n: n.memory.peak,
        lambda n, peak: setattr(n.memory, "peak", peak),
        puts(memory=Stats),
        "uses what an earlier run computed",
    ),
    "a count in what the first call computed": Row(CountsInItsFeatures, "is mutated"),
}
