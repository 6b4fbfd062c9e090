"""Models as requests see them, whichever process runs them: their names, their facts, and `run`."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import shorten
from sopdeploy_service.inference.pace import BatchPace
from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

State: TypeAlias = Literal["ok", "starting", "draining", "engine_starting", "runtime_dead"]


class RuntimeFacts(NamedTuple):
    """What requests may know of a runtime; *largest_batch* is that of the server."""

    name: str
    device: str
    largest_batch: int


class ImageResult(NamedTuple):
    """The outputs of one image by name, (...) float32, logits first, and how its batch ran.

    *stage_seconds* has `queue` and `infer`.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    stage_seconds: Mapping[str, float]
    batch_size: int


def settle(
    future: "asyncio.Future[ImageResult | HttpError]", result: ImageResult | HttpError
) -> None:
    """Set *result* unless the future has one or was cancelled."""
    if not future.done():
        future.set_result(result)


class Model(ABC):
    """A bundle that is served under *name*. Every method is called on the event loop."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        runtime: RuntimeFacts,
        timings: Iterable[tuple[int, float]],
        settings: Settings,
    ) -> None:
        """Describe *bundle* on *runtime*; *timings* has (images, seconds) of batches that have run."""
        self.name = name
        self.bundle = bundle
        self.labels = bundle.labels

        manifest = bundle.manifest
        self.decision = manifest.rules
        self.top_k = settings.classes_per_image(multi_label=self.decision.is_multi_label)
        self.version = manifest.id
        self.logits_name = manifest.outputs[0].name
        self.bundle_name = bundle.name  # kept, as the version: each look-up hashes the manifest

        self.runtime = runtime
        self.largest_batch = runtime.largest_batch
        self.pace = BatchPace(timings)

        self.users = 0  # requests
        self.unused = asyncio.Event()
        self.unused.set()

    @property
    @abstractmethod
    def is_down(self) -> bool:
        """Whether no image can run now; a model whose runtime is in this process never recovers."""

    @property
    def num_devices(self) -> int:
        """How many devices share the images; at least 1."""
        return 1

    @property
    def num_running(self) -> int:
        """How many images are in a batch in this process."""
        return 0

    @abstractmethod
    async def run(
        self,
        pixels: NDArray[np.uint8],
        deadline: float,
        *,
        features: bool = False,
    ) -> ImageResult:
        """Run one image (H, W, 3) in a batch with others; its embedding is in the outputs with *features*.

        *deadline* is a time of `time.monotonic`. Raises `RejectedError` for an image that fails,
        is late or cannot run any more. Cancelling the call removes the image from the queue.
        """


class Registry(ABC):
    """The models of a server by name. Every method is called on the event loop."""

    metrics: Metrics
    _by_name: Mapping[str, Model]

    def models(self) -> Sequence[Model]:
        """Return every model that requests can choose, sorted by their names."""
        return [model for _, model in sorted(self._by_name.items())]

    def find(self, name: str | None = None, version: str | None = None) -> Model:
        """Find the model *name* (None: the only one) with *version* (None: any), or raise `RejectedError`."""
        # Without a name, choose the only model.
        if name is None:
            if len(self._by_name) > 1:
                names = shorten(sorted(self._by_name))
                message = f"the server has several models; choose one with ?model= ({names})"
                raise RejectedError(HttpError("model_needed", 400, message))
            name = next(iter(self._by_name))  # a server has at least one model

        # Refuse an unknown name, or a version that is not the current one.
        if name not in self._by_name:
            message = f"no model {name[:100]!r}; available: {shorten(sorted(self._by_name))}"
            raise RejectedError(HttpError("unknown_model", 404, message))

        model = self._by_name[name]

        if version not in {None, model.version}:
            message = (
                f"{name}: no version {str(version)[:100]!r}; the current one is {model.version}"
            )
            raise RejectedError(HttpError("unknown_version", 404, message))
        return model

    @property
    def num_running(self) -> int:
        """How many images are in batches in this process."""
        return sum(model.num_running for model in self.models())

    @property
    def num_sent(self) -> int:
        """How many images other processes have."""
        return 0

    @contextmanager
    def use(self, model: Model) -> Iterator[None]:
        """Keep *model* loaded during the block. Await nothing since `find`, or it can be released before."""
        model.users += 1
        model.unused.clear()

        try:
            yield
        finally:
            model.users -= 1
            if not model.users:
                model.unused.set()

    @property
    @abstractmethod
    def problem(self) -> State | None:
        """Why a server with these models is not ready; None if it is."""

    @abstractmethod
    async def start(self) -> None:
        """Start what runs the models."""

    @abstractmethod
    async def reload(self, sources: Iterable[str | Path]) -> bool:
        """Find the bundles of *sources* again and serve them, or log why not; return whether they are served."""

    @abstractmethod
    def close(self, reason: HttpError) -> None:
        """Give *reason* to every image without an outcome."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop every model."""
