"""A runtime without a network, for tests and benchmarks: known time, known answers.

A batch of n images takes `fixed_ms + per_image_ms * n` milliseconds, asleep, as an accelerator
does while Python waits for it; so a benchmark measures the server and not the machine's load.
"""

import time

import numpy as np
from numpy.typing import NDArray

STEP = 16  # pixels between those that count: an accelerator's host does next to nothing


class PretendRuntime:
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
        time.sleep(self._fixed + self._per_image * len(images))
        grid = images[:, ::STEP, ::STEP].astype(np.float32)
        means = grid.mean(axis=(1, 2)) / 32
        return {self._output: np.resize(means.T, (self._classes, len(images))).T.copy()}
