"""One bundle that answers: its runtime, its waiting line, its engine thread, and who is using it now."""

import asyncio

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.inference.batcher import Batcher
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model_statistics import ModelStatistics
from sopdeploy_service.inference.queue import QueuedImage
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings


class Users:
    """The requests that are with a model; `gone` is set while there are none."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.gone.set()
        self._number = 0

    def __enter__(self) -> None:
        self._number += 1
        self.gone.clear()

    def __exit__(self, *_problem: object) -> None:
        self._number -= 1
        if self._number == 0:
            self.gone.set()


class Model:
    """A bundle under the *name* clients know it by; every method but `put` is called on the event loop."""

    def __init__(self, name: str, inference: LoadedModel, settings: Settings, metrics: Metrics) -> None:
        self.name = name
        self.loaded = inference
        self.statistics = ModelStatistics()
        self.version = inference.bundle.manifest.id  # whoever knows it can say which weights gave an answer
        self._batcher = Batcher(name, inference, settings, metrics)
        self._users = Users()

    @property
    def bundle(self) -> Bundle:
        """Return the bundle behind it."""
        return self.loaded.bundle

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the class names in output order."""
        return self.loaded.bundle.labels

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

    def in_use(self) -> Users:
        """Keep the model, `with` this, from being stopped by `retire` while a request is with it."""
        return self._users

    def put(self, item: QueuedImage) -> Rejection | None:
        """Let *item* wait for its batch, or return why it cannot; any thread may call this."""
        return self._batcher.put(item)

    def discard(self, item: QueuedImage) -> None:
        """Take *item* out if it still waits for its batch."""
        self._batcher.discard(item)

    def close(self, refusal: Rejection) -> None:
        """Give *refusal* to everything without an outcome and let nothing more in."""
        self._batcher.close(refusal)

    async def retire(self) -> None:
        """Stop once the last request that is with this model has its answer."""
        await self._users.gone.wait()
        await self.stop()

    async def stop(self) -> None:
        """End the engine thread."""
        await self._batcher.stop()
