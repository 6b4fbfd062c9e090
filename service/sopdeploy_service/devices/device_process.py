"""The device process of a device: it runs the images of all front ends with the models of one registry.

Clients reach it only through front ends, which send pixels. It serves no HTTP and decodes
nothing. A front end that does not read its results is cut off.

After a reload, the front ends get new channels with the new models. The models of a channel are
in use until the front end closes it.
"""

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

from prometheus_client import generate_latest

from sopdeploy_service.devices import channel, control
from sopdeploy_service.devices.channel import ChannelError, ModelFacts, Slots
from sopdeploy_service.devices.control import Status
from sopdeploy_service.inference import results
from sopdeploy_service.inference.daemon_threads import DaemonThreads
from sopdeploy_service.inference.model import ImageResult, Registry
from sopdeploy_service.inference.model_worker import LocalModel
from sopdeploy_service.inference.request_queue import QueuedImage
from sopdeploy_service.inference.results import HttpError
from sopdeploy_service.observability.busy import measure_loop
from sopdeploy_service.server.draining_server import follow_links
from sopdeploy_service.server.lifetime import BEAT_SECONDS, EXIT_RUNTIME_DEAD, Joined
from sopdeploy_service.settings import Settings
from sopdeploy_service.tasks import start_task

LAST_SECONDS = 1.0  # for answers that front ends have not read when the process ends

log = logging.getLogger("sopdeploy.inference")


class FrontEndChannel(asyncio.Protocol):
    """The device process's end of the channel to the front end *name*, which serves *models*.

    The front end gets *opening* first. `cancel_by_slot` has a function for each image, which
    cancels it and returns whether its pixels are not read any more, so that the slot is free.
    """

    def __init__(
        self,
        name: str,
        device_process: "DeviceProcess",
        models: Sequence[LocalModel],
        slots: Slots,
        opening: bytes,
    ) -> None:
        self.name = name
        self.cancel_by_slot: dict[int, Callable[[], bool]] = {}
        self._device_process = device_process
        self._models = models
        self._slots = slots
        self._opening = opening

        # For each model: the names of the outputs of an image, without and with features.
        self._names = [
            [tuple(shapes) for shapes in channel.output_shapes(model.bundle)]
            for model in models
        ]

        self._rest = b""  # of an incomplete record
        self._answers = bytearray()  # not sent yet
        self.transport: asyncio.Transport | None = None

        self._in_use = ExitStack()  # holds the models until the end of the channel
        for model in models:
            self._in_use.enter_context(device_process.registry.use(model))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the opening, which describes the models."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._opening)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Forget the images of the front end, which has ended or was cut off."""
        self.transport = None

        self._device_process.front_ends.discard(self)
        for cancel in list(self.cancel_by_slot.values()):
            cancel()
        self.cancel_by_slot.clear()
        self._in_use.close()

    def data_received(self, data: bytes) -> None:
        """Handle the records that have arrived."""
        data = self._rest + data
        whole = len(data) - len(data) % channel.REQUEST.size
        self._rest = data[whole:]

        for record in channel.REQUEST.iter_unpack(memoryview(data)[:whole]):
            self._handle(*record)

    def cut_off(self, reason: str) -> None:
        """Log *reason* and end this channel; the front end gets another one if it still runs."""
        if self.transport is not None:
            self.transport.abort()
            self.transport = None
            log.error("front end %s: %s; its channel ends", self.name, reason)

    def _handle(
        self, kind: int, flags: int, model_number: int, slot: int, deadline: float
    ) -> None:
        """Run or cancel the image in *slot*."""
        # Without `cancel`, the image was answered in the meantime.
        if kind == channel.CANCEL:
            cancel = self.cancel_by_slot.get(slot)
            is_slot_free = cancel is not None and cancel()
            if is_slot_free:
                # Nobody waits for the answer, but it lets the front end use the slot again.
                self._answer(slot, (), results.CLIENT_GONE)
            return

        # Queue the image, whose pixels stay in the slot.
        model = self._models[model_number]
        features = bool(flags & channel.FEATURES)
        names = self._names[model_number][features]
        pixels = self._slots.pixels(slot, model.bundle.manifest.image_shape)
        image = QueuedImage(pixels, deadline, partial(self._answer, slot, names), features)

        self.cancel_by_slot[slot] = partial(model.queue.remove, image)
        model.queue.put(image)

    def _answer(self, slot: int, names: Sequence[str], result: ImageResult | HttpError) -> None:
        """Write *result* into *slot*, and answer at the end of this turn of the loop, with others."""
        if self.transport is None:
            return

        del self.cancel_by_slot[slot]

        if isinstance(result, HttpError):
            self._slots.write_error(slot, result)
            answer = channel.RESULT.pack(slot, channel.FAILED, 0.0, 0.0)
        else:
            self._slots.write_outputs(slot, result.outputs, names)
            seconds = result.stage_seconds
            answer = channel.RESULT.pack(
                slot, result.batch_size, seconds["queue"], seconds["infer"]
            )

        if not self._answers:
            asyncio.get_running_loop().call_soon(self._flush)
        self._answers += answer

    def _flush(self) -> None:
        """Send the answers unless the front end has gone; cut it off if it does not read."""
        answers = self._answers
        self._answers = bytearray()

        if self.transport is not None:
            self.transport.write(answers)
            if self.transport.get_write_buffer_size() > channel.MAX_UNSENT_BYTES:
                self.cut_off("the results are not read")


class DeviceProcess:
    """Runs the images of front ends with *registry* until it may end.

    The bundles are at *sources*; a move of one of *links* reloads them. The *supervisor* sends
    the channels of front ends and gets status reports. A front end may have twice `queue_size`
    images here: those admitted, and those cancelled while their batch runs.
    """

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        supervisor: socket.socket,
        sources: Sequence[str | Path],
        links: Mapping[Path, Path],
    ) -> None:
        self.registry = registry
        self._settings = settings
        self._supervisor = supervisor
        self._sources = sources
        self._links = links

        self.front_ends: set[FrontEndChannel] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reloads = Joined(self._reload, tries_again=settings.follow)
        self._has_new_models = False  # of which the supervisor does not know
        self._supervisor_left = False

        metrics = registry.metrics
        metrics.ready.set_function(lambda: registry.problem is None)
        metrics.images_running.set_function(lambda: registry.num_running)
        metrics.images_waiting.set_function(
            lambda: max(0, self._count_images() - registry.num_running)
        )

    async def run(self) -> int:
        """Serve until the supervisor and the front ends have left; return the exit code.

        It waits about `drain_seconds` for the front ends. The code is 70 if a runtime is dead.
        SIGTERM has no effect: it may reach all processes of a server at once, and front ends
        complete their requests.
        """
        # The supervisor ends this process; a signal of the terminal does not.
        loop = asyncio.get_running_loop()
        loop.set_default_executor(DaemonThreads())  # no work that hangs delays the exit
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGTERM, lambda: None)
            loop.add_signal_handler(signal.SIGINT, lambda: None)

        # Start the models, and serve until the supervisor leaves.
        await self.registry.start()
        start_task(self._tasks, measure_loop(self.registry.metrics.loop_busy))
        loop.add_reader(self._supervisor, self._receive)
        follow_links(self._tasks, self._links, self._reloads.request)

        while self.registry.problem is None and not self._supervisor_left:
            self._report()
            await asyncio.sleep(BEAT_SECONDS)

        # Drain: the front ends complete their requests and leave.
        end = time.monotonic() + self._settings.drain_seconds + LAST_SECONDS
        while self.registry.problem is None and self.front_ends and time.monotonic() < end:
            self._report()
            await asyncio.sleep(BEAT_SECONDS)

        # Answer what is left, and give the front ends time to read it.
        is_dead = self.registry.problem is not None
        self.registry.close(results.DRAINING)  # a runtime that died has answered all images

        await asyncio.sleep(0)  # lets `FrontEndChannel._flush` run
        for front_end in self.front_ends:
            if front_end.transport is not None:
                front_end.transport.close()  # after it has sent the last answers

        end = time.monotonic() + LAST_SECONDS
        while self.front_ends and time.monotonic() < end:
            await asyncio.sleep(BEAT_SECONDS / 10)

        if not is_dead:
            await self.registry.stop()
        return EXIT_RUNTIME_DEAD if is_dead else 0

    def _report(self) -> None:
        """Show the supervisor that the event loop runs, and tell it of new models."""
        bundles = " ".join(model.bundle_name for model in self.registry.models())
        Status(0, self._count_images(), bundles).send(self._supervisor)

        # If this cannot be sent, the next report tries again.
        if self._has_new_models:
            is_sent = control.send_message(self._supervisor, control.NEW_MODELS)
            self._has_new_models = not is_sent

    def _count_images(self) -> int:
        """Count the images of front ends that are not answered."""
        return sum(len(front_end.cancel_by_slot) for front_end in tuple(self.front_ends))

    def _receive(self) -> None:
        """Act on a message of the supervisor; an empty one says that it, or the server, ends."""
        message = control.receive_message(self._supervisor)
        if not message.kind:
            asyncio.get_running_loop().remove_reader(self._supervisor)
            self._supervisor_left = True

        if message.kind == control.RELOAD:
            self._reloads.request()

        for file in message.files:
            if message.kind == control.SEND_METRICS:
                page = generate_latest(self.registry.metrics.registry)
                start_task(self._tasks, control.send_metrics(file, page))
            else:  # `CHANNEL`: a device process gets no other files
                connection = socket.socket(fileno=file)
                start_task(self._tasks, self.connect(message.rest.decode(), connection))

    async def connect(self, name: str, connection: socket.socket) -> None:
        """Serve the front end *name* at the other end of *connection* with the present models."""
        models = cast(Sequence[LocalModel], self.registry.models())
        facts = [ModelFacts.describe(model) for model in models]

        try:
            # Slots of cancelled images are not free at once, so there are twice as many.
            num_slots = 2 * self._settings.queue_size
            slots, description = channel.open_channel(connection, facts, num_slots)
        except (OSError, ChannelError) as error:
            connection.close()
            if not isinstance(error, ConnectionError):  # else the front end has ended
                reason = getattr(error, "strerror", None) or error
                log.error("front end %s: has no channel (%s)", name, reason)
            return

        front_end = FrontEndChannel(name, self, models, slots, description)
        self.front_ends.add(front_end)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: front_end, connection)

    async def _reload(self) -> bool:
        """Reload the bundles; if this changes models, let the supervisor send new channels."""
        before = self.registry.models()
        succeeded = await self.registry.reload(self._sources)
        if self.registry.models() != before:
            self._has_new_models = True
        return succeeded
