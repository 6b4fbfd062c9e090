"""Runtimes of tests: one blocks until a test releases it, one fails on chosen runs."""

import threading

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.runtime.base import OutOfMemoryError
from tests.support.fake_runtime import FakeRuntime


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


class Failing(FakeRuntime):
    """Run number n, from 1, fails as `failures[n]` says: `oom`, `nan` for its first image, or an error."""

    def __init__(self, failures: dict[int, str | BaseException]) -> None:
        super().__init__(num_classes=7, largest_batch=8)
        self._failures = failures
        self._runs = 0

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        self._runs += 1
        failure = self._failures.get(self._runs)
        if failure == "oom":
            raise OutOfMemoryError("no memory for this run")
        if isinstance(failure, BaseException):
            raise failure
        outputs = super().run(images)
        if failure == "nan":
            outputs["logits"][0] = np.nan
        return outputs
