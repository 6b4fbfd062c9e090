"""The replaceable part: whatever turns a batch of images into the network's outputs."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class OutOfMemoryError(Exception):
    """The device has no memory for a batch of this size now; a smaller one may do."""


class DeviceLostError(Exception):
    """The device will answer nothing more in this process (a CUDA error that sticks, say)."""


class Runtime(Protocol):
    """One loaded network on one device; called by one thread at a time."""

    name: str  # with its version
    device: str  # `cpu`, `cuda:0`
    largest_batch: int

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return every output by name, (n, ...) float32, for *images* (n, H, W, 3) uint8.

        n is 1 to `largest_batch`. Nothing that is returned or kept may lie in the memory of *images*: the
        next batch will fill it. Any exception means that this batch got no result; `DeviceLostError` that
        no other will, `OutOfMemoryError` that a smaller one may.
        """
        ...


@runtime_checkable
class Overlapping(Runtime, Protocol):
    """A runtime that is given the next batch while one is at work, so that no device waits for Python."""

    def begin(self, images: Sequence[NDArray[np.uint8]]) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); what is returned waits for it and gives what `run` would.

        At most two may be under way; they end in the order they were begun. The images may change as soon as
        this returns. Raises as `run` does, here or where it is waited for.
        """
        ...
