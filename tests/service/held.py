"""A runtime that blocks until a test releases it, so that images queue up."""

import threading

import numpy as np
from fake_runtime import FakeRuntime
from numpy.typing import NDArray


class Held(FakeRuntime):
    """Blocks until `gate` is set; sets `entered` when the first batch arrives."""

    def __init__(self, *, largest_batch: int = 8) -> None:
        super().__init__(num_classes=7, largest_batch=largest_batch)
        self.gate = threading.Event()
        self.entered = threading.Event()

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        self.entered.set()
        self.gate.wait(60)
        return super().run(images)
