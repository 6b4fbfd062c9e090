"""Runtimes without a network, for tests and benchmarks: known durations, known outputs.

A batch of n images sleeps for `fixed_ms + per_image_ms * n` milliseconds, as Python does while
an accelerator runs. A benchmark therefore measures the server and not the load of the machine.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

STRIDE = (
    16  # between the pixels that are averaged, so that computing the outputs takes little time
)


class FakeRuntime:
    """A runtime whose logits are the mean red, green and blue of an image, repeated over the classes."""

    name = "fake"

    def __init__(
        self,
        *,
        num_classes: int,
        fixed_ms: float = 0.0,
        per_image_ms: float = 0.0,
        largest_batch: int = 8,
        device: str = "fake",
    ) -> None:
        self.device = device
        self.largest_batch = largest_batch
        self.batches: list[int] = []  # sizes of all batches so far, for tests
        self._classes = num_classes
        self._fixed = fixed_ms / 1000
        self._per_image = per_image_ms / 1000

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Sleep, then return the output (n, C) float32 of *images* (n, H, W, 3) uint8."""
        outputs, seconds = self._compute(images)
        time.sleep(seconds)
        return outputs

    def close(self) -> None:
        """Do nothing: there is nothing to release, and tests reuse runtimes."""

    def _compute(
        self, images: NDArray[np.uint8]
    ) -> tuple[dict[str, NDArray[np.float32]], float]:
        """Return the output of a batch of *images* and the seconds that it takes."""
        self.batches.append(len(images))
        grid = images[:, ::STRIDE, ::STRIDE].astype(np.float32)
        means = grid.mean(axis=(1, 2)) / 32
        logits = np.resize(means.T, (self._classes, len(images))).T.copy()
        return {"logits": logits}, self._fixed + self._per_image * len(images)


class FakeOverlappingRuntime(FakeRuntime):
    """A `FakeRuntime` that can begin a batch while another one runs."""

    _free_at = 0.0  # when the device has finished everything it was given
    _buffer: NDArray[np.uint8] | None = (
        None  # as real ones, it copies images to memory that it keeps
    )

    def begin(
        self, images: Sequence[NDArray[np.uint8]], names: Sequence[str] | None = None
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); return a function that sleeps until it is done."""
        if self._buffer is None:
            self._buffer = np.empty((self.largest_batch, *images[0].shape), np.uint8)
        outputs, seconds = self._compute(np.stack(images, out=self._buffer[: len(images)]))
        done_at = self._free_at = max(time.monotonic(), self._free_at) + seconds

        def wait() -> dict[str, NDArray[np.float32]]:
            time.sleep(max(0.0, done_at - time.monotonic()))
            return outputs

        return wait
