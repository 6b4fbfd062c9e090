"""Queues and registry of a front end, for models that run in the inference process.

`RemoteQueue` and `RemoteRegistry` take the place of `RequestQueue` and `ModelRegistry`: admission, decoding,
deadlines and responses are the same code with one process and with several.
"""

import asyncio
import itertools
import logging
import math
import socket
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy_service.front_ends import channel
from sopdeploy_service.front_ends.channel import (
    IMAGE_HEAD,
    RESULT_HEAD,
    MessageKind,
    read_model,
)
from sopdeploy_service.front_ends.inference_process import HTTP_ERRORS
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_worker import QueuedImage, RequestQueue, call_soon
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.inference.results import NONFINITE, RUNTIME_DEAD, HttpError, Prediction, rank_classes
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.metrics import Metrics, drift_window
from sopdeploy_service.settings import Settings

log = logging.getLogger("sopdeploy.inference")


class RemoteQueue(RequestQueue):
    """Sends images to the inference process, which knows *model* by *number*. `put` is thread-safe."""

    def __init__(self, model: Model, number: int, registry: "RemoteRegistry", metrics: Metrics) -> None:
        super().__init__()
        self._model, self._number, self._registry, self._metrics = model, number, registry, metrics
        self._counts = metrics.of(model.name)
        self._drift = drift_window(model.bundle)
        outputs = model.bundle.manifest.outputs
        self._shapes = {output.name: tuple(side or 1 for side in output.shape[1:]) for output in outputs}
        self._logits = outputs[0].name

    def put(self, item: QueuedImage) -> HttpError | None:
        """Send the image of *item* from the event loop."""
        if self.closed_with is None:
            call_soon(item.outcome.get_loop(), self._send, item)
        return self.closed_with

    def _send(self, item: QueuedImage) -> None:
        if self.closed_with is not None:
            item.settle(self.closed_with)
        if not item.outcome.done():  # otherwise its request has ended, too
            number = self._registry.add(self, item)
            head = IMAGE_HEAD.pack(self._number, item.features, item.arrived, item.deadline)
            self._registry.send(MessageKind.IMAGE, number, head, item.image.tobytes())

    def reject(self, items: Sequence[QueuedImage], reason: HttpError) -> None:
        """Give *reason* to all *items* without an outcome, and cancel those that were sent."""
        for item in items:
            item.settle(reason)
        for number, (_, item) in self._registry.images.items():
            if item in items:
                self._registry.send(MessageKind.CANCEL, number)

    def close(self, reason: HttpError) -> list[QueuedImage]:
        """Give *reason* to every image from now on; return those that have no result."""
        self.closed_with = reason
        return [item for sender, item in self._registry.images.values() if sender is self]

    def settle(self, item: QueuedImage, result: bytes) -> None:
        """Settle *item* with its *result*, and count the image and, for the first of a batch, the batch."""
        code, batch, row, queue_seconds, infer_seconds = RESULT_HEAD.unpack_from(result)
        if code:
            reason = HTTP_ERRORS[code - 1]
            if reason is NONFINITE:
                self._counts.nonfinite.inc()
            item.settle(reason)
            return
        outputs = self._read_outputs(item, result)
        logits = [outputs[self._logits]]
        started = item.arrived + queue_seconds
        ended = started + infer_seconds
        self._model.latency.record(batch, infer_seconds)
        if row == 0:
            # Images of other front ends may be in the batch; each front end counts the waiting of its own.
            self._counts.batch([], self._model.largest_batch, started, ended, num_images=batch)
        self._metrics.stage("queue", queue_seconds)
        if self._drift is not None:  # every front end tests windows of its own images
            self._drift.add(logits)
            self._counts.drift = self._drift.latest
        (ranked,) = rank_classes(np.stack(logits), item.top_k) if item.top_k else [[]]
        timings = queue_seconds, infer_seconds
        item.settle(Prediction(outputs, *timings, batch, row, ranked, item.warnings))

    def _read_outputs(self, item: QueuedImage, result: bytes) -> dict[str, NDArray[np.float32]]:
        """Read the outputs from *result*."""
        values = np.frombuffer(result, np.uint8, offset=RESULT_HEAD.size)
        outputs, end = {}, 0
        for name, shape in self._shapes.items():
            if name != EMBEDDING or item.features:
                start, end = end, end + 4 * math.prod(shape)
                outputs[name] = values[start:end].view(np.float32).reshape(shape)
        return outputs


class RemoteRegistry(ModelRegistry):
    """The models of the inference process, which the supervisor replaces when it ends.

    `images` has the images without a result, and their queues, by number.
    """

    is_replaced = True

    def __init__(self, connection: socket.socket, settings: Settings, metrics: Metrics) -> None:
        """Wait for the models of the inference process at the other end of *connection*.

        Raises `ConnectionError` if it ends.
        """
        super().__init__({}, settings, metrics)
        self._connection = connection
        self._writer: asyncio.StreamWriter | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self.images: dict[int, tuple[RemoteQueue, QueuedImage]] = {}
        number = -1
        while number != 0:  # that of the last model, before other messages
            _, number, body = channel.receive_blocking(connection)
            name, loaded = read_model(body)
            self.count(name, loaded, 1)
            model = Model(name, loaded, settings, metrics)  # never started: it has no worker here
            model.queue = RemoteQueue(model, number, self, metrics)
            self._by_name[name] = model

    async def start(self) -> None:
        """Open the channel and handle the messages of the inference process."""
        reader, self._writer = await channel.open_channel(self._connection)
        self._receiving = asyncio.get_running_loop().create_task(self._receive(reader))

    async def stop(self) -> None:
        """Stop every model and close the channel."""
        await super().stop()
        if self._receiving is not None:
            self._receiving.cancel()
        if self._writer is not None:
            self._writer.close()

    def send(self, kind: MessageKind, number: int, *parts: bytes) -> None:
        """Send a message to the inference process."""
        if self._writer is not None:
            channel.send_message(self._writer, kind, number, *parts)

    def add(self, queue: RemoteQueue, item: QueuedImage) -> int:
        """Add *item* of *queue* to `images`; return its number."""
        number = next(self._numbers) % 0xFFFF_FFFF
        self.images[number] = queue, item
        return number

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._handle(*await channel.receive_message(reader))
        except ConnectionError:
            log.error("the inference process has ended")
            self.problem = self.problem or "the inference process has ended; it is started again"
        except Exception:
            log.exception("a message of the inference process cannot be handled")
            self.is_replaced = False  # this front end ends
        for model in self.models():
            model.dead = True
            model.close(RUNTIME_DEAD)

    def _handle(self, kind: int, number: int, body: bytes) -> None:
        if kind == MessageKind.RESULT:
            queue, item = self.images.pop(number)
            queue.settle(item, body)


async def attach(service: Service, connection: socket.socket) -> None:
    """Let *service* use the models at the other end of *connection*; requests in progress keep theirs."""
    try:
        registry = await asyncio.to_thread(RemoteRegistry, connection, service.settings, service.metrics)
    except ConnectionError:  # the supervisor starts another inference process
        return
    await registry.start()
    previous, service.registry = service.registry, registry
    for model in previous.models():
        await model.unused.wait()
        previous.count(model.name, model.loaded, -1)
    await previous.stop()
