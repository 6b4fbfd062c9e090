"""The inference process: it owns the runtimes of one device and runs the images of all its front ends.

It loads and runs models as a single process does (`ModelRegistry`). Clients reach it only through front ends,
which send pixels: so a device has one process that uses it.

Front ends decode images of untrusted clients and may be compromised, so everything that they send is checked.
A front end that breaks the protocol is disconnected, and replaced by the supervisor.

After a reload, the front ends get new channels with the new models. The models of a channel are kept until
the front end closes it.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.errors import SopdeployError
from sopdeploy_service.front_ends import channel, control
from sopdeploy_service.front_ends.channel import (
    IMAGE_HEAD,
    RESULT_HEAD,
    ChannelError,
    MessageKind,
    archive_model,
)
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_worker import QueuedImage
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.inference.results import (
    CLIENT_GONE,
    DEADLINE,
    DRAINING,
    INFERENCE_FAILED,
    NONFINITE,
    OUT_OF_MEMORY,
    RUNTIME_DEAD,
    HttpError,
    Outcome,
)
from sopdeploy_service.observability import logs
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.launch import BEAT_SECONDS, EXIT_RUNTIME_DEAD, run_program, start_task
from sopdeploy_service.settings import Settings

MAX_UNSENT_BYTES = 1 << 27  # results that a front end does not read
MAX_AGE_SECONDS = 60.0  # of an image when it gets here; an earlier arrival is not believed
HTTP_ERRORS = (
    CLIENT_GONE, DEADLINE, DRAINING, RUNTIME_DEAD, INFERENCE_FAILED, NONFINITE, OUT_OF_MEMORY,
)  # fmt: skip
CODES = {reason.code: position for position, reason in enumerate(HTTP_ERRORS, 1)}  # 0: outputs

log = logging.getLogger("sopdeploy.inference")


@dataclass(eq=False)
class FrontEnd:
    """A front end: the writer of its channel, the models that it knows, and its images by number."""

    name: str
    writer: asyncio.StreamWriter
    models: Sequence[Model]
    images: dict[int, tuple[Model, QueuedImage]] = field(default_factory=dict)


class InferenceProcess:
    """Runs the images of all front ends with the models of *registry*, whose bundles are at *sources*.

    The *supervisor* sends the channels of front ends, and gets status reports. A front end may have
    `queue_size` images of *settings* here.
    """

    def __init__(
        self, registry: ModelRegistry, supervisor: socket.socket, settings: Settings, sources: Sequence[str]
    ) -> None:
        self._registry = registry
        self._supervisor = supervisor
        self._sources = sources
        self._settings = settings
        self._ended = asyncio.Event()
        self._front_ends: set[FrontEnd] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Serve until the supervisor closes its socket; return the exit code, 70 if a runtime is dead."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._supervisor, self._receive_front_end)
        await self._registry.start()
        control.send_files(self._supervisor, control.NEW_MODELS)
        dead = False
        while not dead and not self._ended.is_set():
            self._beat()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), BEAT_SECONDS)
            dead = any(model.dead for model in self._registry.models())
        loop.remove_reader(self._supervisor)
        self._supervisor.close()
        self._registry.close(DRAINING)
        for task in self._tasks:
            task.cancel()
        if not dead:  # otherwise a thread may hang
            await self._registry.stop()
        return EXIT_RUNTIME_DEAD if dead else 0

    def _beat(self) -> None:
        bundles = " ".join(model.bundle.name for model in self._registry.models())
        control.send_files(self._supervisor, control.STATUS.pack(0, 0) + bundles.encode())

    def _receive_front_end(self) -> None:
        """Receive the channel of a front end, reload, or detect that the supervisor has ended."""
        message, files = control.receive_files(self._supervisor)
        for file in files:
            start_task(self._tasks, self.serve(message.decode(), socket.socket(fileno=file)))
        if message == control.RELOAD:
            start_task(self._tasks, self._reload())
        elif not files:
            self._ended.set()

    async def _reload(self) -> None:
        before = self._registry.models()
        await self._registry.reload(self._sources)
        if self._registry.models() != before:
            control.send_files(self._supervisor, control.NEW_MODELS)

    async def serve(self, name: str, connection: socket.socket) -> None:
        """Serve the front end *name* until it ends or breaks the protocol."""
        reader, writer = await channel.open_channel(connection)
        front_end = FrontEnd(name, writer, self._registry.models())
        self._front_ends.add(front_end)
        stack = ExitStack()
        try:
            for number, model in reversed([*enumerate(front_end.models)]):  # 0: the front end has all models
                stack.enter_context(model.in_use())
                channel.send_message(writer, MessageKind.MODEL, number, archive_model(model))
            while True:
                kind, number, body = await channel.receive_message(reader)
                if kind == MessageKind.IMAGE:
                    self._queue(front_end, number, body)
                elif kind != MessageKind.CANCEL:
                    raise ChannelError(f"unknown message {kind}")
                elif number in front_end.images:
                    model, item = front_end.images[number]
                    model.queue.reject([item], CLIENT_GONE)
        except ConnectionError:
            log.debug("front end %s has ended", name)
        except Exception as error:  # whatever a front end sends must not end this process
            expected = isinstance(error, (ChannelError, ValueError, struct.error))
            log.error("front end %s: %s; it is replaced", name, str(error), exc_info=not expected)
            control.send_files(self._supervisor, control.BAD_FRONT_END + b": " + name.encode())
        finally:
            self._front_ends.discard(front_end)
            writer.close()
            for model, item in tuple(front_end.images.values()):
                model.queue.reject([item], CLIENT_GONE)
            stack.close()

    def _queue(self, front_end: FrontEnd, number: int, body: bytes) -> None:
        """Queue an image of *front_end*.

        Every value is checked; raises `ChannelError` for one that a correct front end never sends.
        """
        model_number, features, arrived, deadline = IMAGE_HEAD.unpack_from(body)
        if number in front_end.images or len(front_end.images) >= self._settings.queue_size:
            raise ChannelError(f"image {number} was sent twice, or there are too many images")
        if model_number >= len(front_end.models):
            raise ChannelError(f"unknown model {model_number}")
        if front_end.writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise ChannelError("the results are not read")
        now = time.monotonic()
        item = QueuedImage(
            outcome=asyncio.get_running_loop().create_future(),
            deadline=deadline,
            features=features,
            arrived=arrived if now - MAX_AGE_SECONDS < arrived <= now else now,
        )
        item.outcome.add_done_callback(partial(self._send_result, front_end, number, item))
        model = front_end.models[model_number]
        front_end.images[number] = model, item
        pixels = np.frombuffer(body, np.uint8, offset=IMAGE_HEAD.size)
        item.image = pixels.reshape(model.bundle.manifest.image_shape)
        reason = model.queue.put(item)
        if reason is not None:
            item.settle(reason)

    def _send_result(
        self, front_end: FrontEnd, number: int, item: QueuedImage, done: "asyncio.Future[Outcome]"
    ) -> None:
        """Send the outcome of an image, unless its front end has ended."""
        front_end.images.pop(number, None)
        if front_end not in self._front_ends:
            return
        outcome = done.result()
        if isinstance(outcome, HttpError):
            result = RESULT_HEAD.pack(CODES[outcome.code], 0, 0, 0.0, 0.0)
            channel.send_message(front_end.writer, MessageKind.RESULT, number, result)
            return
        outputs = [
            values.tobytes() for name, values in outcome.outputs.items() if name != EMBEDDING or item.features
        ]
        timings = outcome.queue_seconds, outcome.infer_seconds
        result = RESULT_HEAD.pack(0, outcome.batch, outcome.row, *timings)
        channel.send_message(front_end.writer, MessageKind.RESULT, number, result, *outputs)


def run_inference_process(launch_config: Mapping[str, Any]) -> int:
    """Load the models and serve; return the exit code."""
    settings = Settings(**launch_config["settings"])
    supervisor = socket.socket(fileno=launch_config["control"])
    with logs.configured(settings):
        sources: Sequence[str] = launch_config["sources"]
        try:
            store = BundleStore(sources)
            loaded = {
                name: load_model(path, settings, store.checked.get(path))
                for name, path in store.bundles.items()
            }
        except SopdeployError as problem:
            control.send_files(supervisor, control.FAILED + b": " + str(problem).encode())
            raise
        registry = ModelRegistry(loaded, settings, Metrics())
        return asyncio.run(InferenceProcess(registry, supervisor, settings, sources).run())


if __name__ == "__main__":
    exit_code = run_program(run_inference_process)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # without waiting for a thread that hangs in a runtime
