"""Short runs of a small network on a quarter of the digits, for the tests of training.

Reading a picture takes as long as learning from it here, so a run of few pictures takes half the time.
"""

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from sopdeploy.checkpoint import Checkpoint, read_checkpoint
from sopdeploy.training.recipe import Recipe, read_recipe

SHORT = [
    "epochs=3",
    "batch_size=60",
    "model.config.base_width=4",
    "model.config.aux_dropout=0.5",
    "preprocess.resize=8",
    "preprocess.crop=8",
]


@contextmanager
def few_digits() -> Iterator[None]:
    """Within it the digits are every fourth of them: 359 to learn from, 91 held out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sopdeploy.data.datasets.small.load_digits", every_fourth)
        yield


@functools.cache
def every_fourth() -> Bunch:
    whole = load_digits()
    return Bunch(images=whole.images[::4], target=whole.target[::4])


def short_recipe(*overrides: str) -> Recipe:
    """Return the demo on 8 pixels, narrower, with dropout: three epochs of six steps on `few_digits`."""
    return read_recipe("digits-dsop", [*SHORT, *overrides])


@dataclass
class Onlooker:
    """Writes down what it is told and sends this process a signal at a chosen moment."""

    stop_at: tuple[str, int, int] | None = None
    signal_number: int = signal.SIGINT
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def started(self, **facts: Any) -> None:
        self.told.append(("started", facts))

    def warned(self, warning: str) -> None:
        self.told.append(("warned", {"warning": warning}))

    def stepped(self, **facts: Any) -> None:
        self.told.append(("stepped", facts))
        self.maybe_stop("stepped", facts["epoch"], facts["step"])

    def measured(self, **facts: Any) -> None:
        self.told.append(("measured", facts))
        self.maybe_stop("measured", facts["epoch"], facts["done"])

    def finished_epoch(self, row: Any) -> None:
        self.told.append(("finished", {"row": row}))
        self.maybe_stop("finished", row.epoch - 1, 0)

    def maybe_stop(self, *moment: Any) -> None:
        if moment == self.stop_at:
            os.kill(os.getpid(), self.signal_number)


def same_bits(left: Any, right: Any) -> bool:
    """Say whether two nests of tables, lists and tensors are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


def same_run(left: Path, right: Path) -> bool:
    """Say whether two runs ended with the same weights, momentum and history but for the time taken."""
    a, b = read_checkpoint(left / "last.pt"), read_checkpoint(right / "last.pt")
    return same_bits(a.weights, b.weights) and same_bits(without_times(a), without_times(b))


def without_times(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.resume is not None
    position = dict(checkpoint.resume["position"], seconds=0, learning=0, waiting=0)
    position["history"] = [dict(row, seconds=0, speed=None) for row in position["history"]]
    return {**checkpoint.resume, "position": position}
