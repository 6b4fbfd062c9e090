"""Models and registry of a front end, for models that run in the engine process.

`RemoteModel` and `RemoteRegistry` take the place of `Model` and `ModelRegistry`: admission, decoding,
deadlines and responses are the same code with one process and with several.
"""

import json
import math
import os
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.class_maps import FEATURES, read_class_maps
from sopdeploy.bundle.folder import MANIFEST, Bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy_service.images.loaders import FastDecode
from sopdeploy_service.inference.engine_process.client import NO_SLOT, EngineClient, Slot
from sopdeploy_service.inference.engine_process.fronts import REJECTIONS, WANTS_FEATURES
from sopdeploy_service.inference.engine_process.models import FACTS, LABELS
from sopdeploy_service.inference.engine_process.slots import Reply, Request
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_worker import QueuedImage, RequestQueue, call_soon
from sopdeploy_service.inference.registry import NOT_CONTROLLED, ModelRegistry, Versions
from sopdeploy_service.inference.results import (
    ENGINE_DEAD,
    NONFINITE,
    Outcome,
    Prediction,
    Ranking,
    RejectedError,
    Rejection,
)
from sopdeploy_service.observability.drift import drift_window
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings


@dataclass(slots=True)
class EngineRuntime:
    """Name and device of a runtime in the engine process, for a front end."""

    name: str
    device: str
    largest_batch: int

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Raise an error: only the engine process runs images."""
        raise NotImplementedError

    def close(self) -> None:
        """Do nothing: the engine process closes its runtime."""


class RemoteQueue(RequestQueue):
    """Sends images to the engine, in slots that `reserve` takes. `put` is thread-safe."""

    def __init__(self, model: "RemoteModel", client: EngineClient, metrics: Metrics) -> None:
        super().__init__()
        self._model, self._client, self._metrics = model, client, metrics
        self._sending = threading.Lock()
        manifest = model.bundle.manifest
        self._drift = drift_window(model.bundle)
        self._shape = tuple(manifest.image_shape)
        shapes = {output.name: tuple(side or 1 for side in output.shape[1:]) for output in manifest.outputs}
        self._outputs = [(name, shape, math.prod(shape)) for name, shape in shapes.items()]

    @property
    def images_elsewhere(self) -> int:
        """The number of images in the engine that other front ends have sent."""
        return self._client.images_elsewhere

    def reserve(self, items: Sequence[QueuedImage]) -> Rejection | None:
        """Take a slot for each of *items*; return the rejection if there are too few free slots."""
        if self.closed_with is not None or not self._client.alive:
            return self.closed_with or ENGINE_DEAD
        if self._client.num_free < max(1, len(items)):
            return NO_SLOT
        for item, slot in zip(items, self._client.take(len(items)) or (), strict=True):
            item.slot, slot.item = slot, item
        return None

    def release(self, items: Sequence[QueuedImage]) -> None:
        """Free the slots of *items* that were not sent, and cancel those that have no reply."""
        for item in items:
            with self._sending:
                slot, item.slot = item.slot, None
            if slot is not None and not slot.sent:
                self._client.give_back(slot)
            elif slot is not None and slot.item is not None:
                slot.pool.slots.cancel(slot.number)

    def put(self, item: QueuedImage) -> Rejection | None:
        """Copy the image of *item* to its slot and send it, unless its request has ended."""
        with self._sending:
            slot: Slot | None = item.slot
            if self.closed_with is not None or slot is None:
                return self.closed_with
            slot.sent = True  # `release` leaves it to the engine from now on
        np.copyto(slot.pool.slots.pixels(slot.number, self._shape), item.image)
        flags = WANTS_FEATURES if item.features else 0
        request = Request(self._model.number, flags, 0, item.arrived, item.deadline, slot.generation)
        if self._client.submit(slot, self, request):
            return None
        with self._sending:
            slot.sent, released = False, item.slot is None
        if released:
            call_soon(item.outcome.get_loop(), self._client.give_back, slot)
        return ENGINE_DEAD

    def reject(self, items: Sequence[QueuedImage], rejection: Rejection) -> None:
        """Give *rejection* to those of *items* without an outcome; `release` frees their slots."""
        for item in items:
            item.settle(rejection)

    def close(self, rejection: Rejection) -> list[QueuedImage]:
        """Give *rejection* to every image from now on; return those that wait for the engine."""
        with self._sending:
            self.closed_with = rejection
        return [slot.item for slot in self._client.waiting() if slot.owner is self and slot.item is not None]

    def on_reply(self, slot: Slot, reply: Reply | None, shared: dict[Any, Any]) -> None:
        """Settle the image in *slot*; the classes of all images in one read are ranked together."""
        item: QueuedImage | None = slot.item
        slot.item = None
        if item is None:
            return
        outcome: Outcome = ENGINE_DEAD
        if reply is not None and reply.code:
            outcome = REJECTIONS[reply.code - 1]
            if outcome is NONFINITE:
                self._model.counts.nonfinite.inc()
        elif reply is not None:
            outcome = self._predict(slot, item, reply, shared)
        item.settle(outcome)

    def after_read(self, found: tuple[Ranking, list[NDArray[np.float32]]]) -> None:
        """Count the predictions of one read; every front end tests windows of its own images for drift."""
        if self._drift is not None:
            self._drift.add(found[1])
            self._model.counts.drift = self._drift.latest

    def _predict(self, slot: Slot, item: QueuedImage, reply: Reply, shared: dict[Any, Any]) -> Prediction:
        """Copy the outputs out of *slot*; count the image and, for the first image of a batch, the batch."""
        values = slot.pool.slots.floats(slot.number)[: reply.length // 4].copy()
        outputs, end = {}, 0
        for name, shape, size in self._outputs:
            if name != FEATURES or item.features:
                start, end = end, end + size
                outputs[name] = values[start:end].reshape(shape)
        if self not in shared:
            logits: list[NDArray[np.float32]] = []
            shared[self] = Ranking(logits), logits
            self._model.latency.record(reply.batch, reply.infer_seconds)
        ranking, logits = shared[self]
        logits.append(outputs[self._outputs[0][0]])
        started = item.arrived + reply.queue_seconds
        ended = started + reply.infer_seconds
        if reply.row == 0:
            self._model.counts.batch([], self._model.largest_batch, started, ended, images=reply.batch)
        self._metrics.stage("queue", reply.queue_seconds)
        if item.trace is not None:
            item.trace.record_batch([item.trace], started, ended)
        timings = reply.queue_seconds, reply.infer_seconds, reply.batch
        return Prediction(outputs, *timings, ranking, len(logits) - 1, item.warnings, item.size)


class RemoteModel(Model):
    """A model of the engine process, which knows it by *number*."""

    def __init__(
        self,
        name: str,
        number: int,
        loaded: LoadedModel,
        settings: Settings,
        metrics: Metrics,
        client: EngineClient,
        file: IO[bytes],
    ) -> None:
        """Create the model; it closes *file*, the archive of the bundle, when it is stopped."""
        super().__init__(name, loaded, settings, metrics)
        self._file = file
        self.number, self._client, self._engine = number, client, client.engines
        self.counts = metrics.of(name)
        self.queue = RemoteQueue(self, client, metrics)

    def start(self) -> None:
        """Do nothing: the model runs in the engine process."""

    async def stop(self, *, keep_runtime: bool = False) -> None:
        """Close the model and let the engine release it."""
        await super().stop(keep_runtime=keep_runtime)
        self._client.release_model(self.number, self._engine)
        self._file.close()


class RemoteRegistry(ModelRegistry):
    """The models of the engine process; changes are made there and announced to all front ends."""

    def __init__(self, client: EngineClient, settings: Settings, metrics: Metrics) -> None:
        """Create a registry with the models that *client* has received from the engine."""
        super().__init__({}, settings, metrics, None)
        self._client = client
        self._numbered: dict[int, RemoteModel] = {}
        client.listen(self)

    def set_models(self, numbers: dict[str, list[int]], archives: dict[int, int]) -> None:
        """Serve the models *numbers*; retire those that are not listed."""
        for number, file in archives.items():
            self._numbered[number] = self._open(number, file)
        before = self.models()
        self._by_name = {
            name: Versions(*(self._numbered[number] for number in listed)) for name, listed in numbers.items()
        }
        kept = set(self.models())
        self._numbered = {number: model for number, model in self._numbered.items() if model in kept}
        for model in before:
            if model not in kept:
                self._retire(model)

    def set_alive(self, *, alive: bool) -> None:
        """Mark every model as dead or alive."""
        for model in self.models():
            model.dead = not alive

    def forget_models(self) -> None:
        """Reject every image of the models of an engine that is gone."""
        self._numbered = {}
        for model in (*self.models(), *self._retiring):
            model.dead = True
            model.close(ENGINE_DEAD)

    async def load(self, name: str, folder: str | None = None) -> Model:
        """Make the engine load a bundle as *name*."""
        return await self._change("load", name, folder)

    async def roll_back(self, name: str) -> Model:
        """Make the engine serve the previous version of *name* again."""
        self.find(name)
        return await self._change("roll_back", name)

    async def unload(self, name: str) -> None:
        """Make the engine stop serving *name*."""
        self.find(name)
        await self._command("unload", name)

    async def _change(self, operation: str, name: str, folder: str | None = None) -> Model:
        await self._command(operation, name, folder)
        return self.find(name)

    async def _command(self, operation: str, name: str, folder: str | None = None) -> None:
        if not self._settings.model_control:
            raise RejectedError(NOT_CONTROLLED)
        rejection = await self._client.command(operation, name, folder)
        if rejection is not None:
            raise RejectedError(rejection)

    def _open(self, number: int, file: int) -> RemoteModel:
        """Open the archive *file* of a model."""
        opened = os.fdopen(file, "rb")
        archive = zipfile.ZipFile(opened)
        facts: Mapping[str, Any] = json.loads(archive.read(FACTS))
        manifest = Manifest.from_bytes(archive.read(MANIFEST))
        folder = cast(Path, zipfile.Path(archive))  # has the methods that readers of bundles use
        fast = facts["fast_decode"]
        loaded = LoadedModel(
            bundle=Bundle(path=folder, manifest=manifest, labels=tuple(json.loads(archive.read(LABELS)))),
            runtime=EngineRuntime(facts["runtime"], facts["device"], facts["largest_batch"]),
            replays={},
            timings=tuple((images, seconds) for images, seconds in facts["timings"]),
            fast_decode=None if fast is None else FastDecode(**fast),
            class_maps=read_class_maps(folder, manifest),
        )
        self._count(facts["name"], loaded)
        return RemoteModel(facts["name"], number, loaded, self._settings, self._metrics, self._client, opened)
