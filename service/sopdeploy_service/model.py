"""One bundle that answers: its runtime, its waiting line, its engine thread, and who is using it now."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle import Bundle
from sopdeploy_service.batcher import Batcher
from sopdeploy_service.ledger import Ledger
from sopdeploy_service.metrics import Metrics
from sopdeploy_service.outcome import Outcome, Refusal
from sopdeploy_service.settings import Settings
from sopdeploy_service.verified import Inference


class Model:
    """A bundle under the *name* clients know it by; every method is called on the event loop."""

    def __init__(self, name: str, inference: Inference, settings: Settings, metrics: Metrics) -> None:
        self.name = name
        self.inference = inference
        self.ledger = Ledger()
        self.version = inference.bundle.manifest.id  # whoever knows it can say which weights gave an answer
        self._batcher = Batcher(name, inference, settings, metrics)
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def bundle(self) -> Bundle:
        """Return the bundle behind it."""
        return self.inference.bundle

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the class names in output order."""
        return self.inference.bundle.labels

    @property
    def dead(self) -> bool:
        """Return whether its engine has died or hangs; that is for ever."""
        return self._batcher.dead

    @property
    def largest_batch(self) -> int:
        """Return how many images one batch may hold."""
        return self._batcher.largest

    def seconds(self, images: int) -> float:
        """Return the measured engine time of so many *images*, in full batches; 0 before any was measured."""
        return self._batcher.seconds(images)

    def start(self) -> None:
        """Start the engine thread."""
        self._batcher.start()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the model from being stopped by `retire` while a request is with it."""
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._unused.set()

    async def infer(self, image: NDArray[np.uint8], deadline: float) -> Outcome:
        """Return the outcome of *image* (H, W, 3); *deadline* is on the clock of `time.monotonic`."""
        return await self._batcher.submit(image, deadline)

    def close(self, refusal: Refusal) -> None:
        """Give *refusal* to everything without an outcome and let nothing more in."""
        self._batcher.close(refusal)

    async def retire(self) -> None:
        """Stop once the last request that is with this model has its answer."""
        await self._unused.wait()
        await self.stop()

    async def stop(self) -> None:
        """End the engine thread."""
        await self._batcher.stop()
