"""A runtime without a network, for tests and benchmarks: known time, known answers.

A batch of n images takes `fixed_ms + per_image_ms * n` milliseconds, asleep, as an accelerator
does while Python waits for it; so a benchmark measures the server and not the machine's load.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

STEP = 16  # pixels between those that count: an accelerator's host does next to nothing


class FakeRuntime:
    """The logits of an image are its mean red, green and blue over a grid, repeated over the classes."""

    name = "pretend"

    def __init__(
        self,
        *,
        classes: int,
        fixed_ms: float = 0.0,
        per_image_ms: float = 0.0,
        largest_batch: int = 8,
        output: str = "logits",
        device: str = "pretend",
    ) -> None:
        self.device = device
        self.largest_batch = largest_batch
        self.batches: list[int] = []  # the size of every batch so far
        self._classes = classes
        self._output = output
        self._fixed = fixed_ms / 1000
        self._per_image = per_image_ms / 1000

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return the output (n, C) float32 for *images* (n, H, W, 3) uint8, after the sleep."""
        self.batches.append(len(images))
        time.sleep(self.seconds(len(images)))
        return self.outputs(images)

    def seconds(self, images: int) -> float:
        """Return how long a batch of so many *images* takes."""
        return self._fixed + self._per_image * images

    def outputs(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return the output (n, C) float32 for *images* (n, H, W, 3) uint8."""
        grid = images[:, ::STEP, ::STEP].astype(np.float32)
        means = grid.mean(axis=(1, 2)) / 32
        return {self._output: np.resize(means.T, (self._classes, len(images))).T.copy()}


class FakeDevice(FakeRuntime):
    """The same as a device with a queue of its own: the next batch is begun while one is at work."""

    _free = 0.0  # when the device will have done all that it was given

    def begin(self, images: Sequence[NDArray[np.uint8]]) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); what is returned sleeps until it is done."""
        self.batches.append(len(images))
        due = self._free = max(time.monotonic(), self._free) + self.seconds(len(images))
        outputs = self.outputs(np.stack(images))

        def wait() -> dict[str, NDArray[np.float32]]:
            time.sleep(max(0.0, due - time.monotonic()))
            return outputs

        return wait
