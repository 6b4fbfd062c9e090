"""The models of a front end, which device processes run.

`RemoteModel` and `RemoteRegistry` take the place of `LocalModel` and `ModelRegistry`:
admission, decoding, deadlines and answers are the same code with one process and with several.
Each image goes to the device process with the fewest images of this front end that it has not answered.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import first_line
from sopdeploy_service.devices import channel
from sopdeploy_service.devices.channel import ChannelError
from sopdeploy_service.inference import results
from sopdeploy_service.inference.model import ImageResult, Model, Registry, State, settle
from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings
from sopdeploy_service.tasks import start_task

log = logging.getLogger("sopdeploy.inference")


class DeviceChannel(asyncio.Protocol):
    """This front end's end of the channel at *connection* to the device process *device_process*.

    *models* are the models of the device process, which this channel names by their position.
    """

    def __init__(self, device_process: str, connection: socket.socket) -> None:
        """Wait for the description of the models; without it, close *connection*, raise `ChannelError`."""
        self.device_process = device_process
        self._connection = connection

        try:
            self.models, self._slots = channel.receive_opening(connection)
        except (ChannelError, OSError, ValueError) as error:
            connection.close()
            raise ChannelError(f"{device_process}: {first_line(error)}") from error
        self.is_open = False  # until `open`, and after the end of the device process
        self.sent = 0  # images
        self._free_slots = list(range(self._slots.count))

        # For each model: the shapes of the outputs of an image by name, without and with
        # features.
        self._shapes = [channel.output_shapes(model.bundle) for model in self.models]

        # By slot: the future of the image that is there, and the shapes of its outputs.
        self._images: dict[
            int, tuple[asyncio.Future[ImageResult | HttpError], Mapping[str, tuple[int, ...]]]
        ] = {}
        self._requests = bytearray()  # not sent yet
        self._rest = b""  # of an incomplete record
        self._ended_with = results.RUNTIME_DEAD

    async def open(self, on_lost: Callable[["DeviceChannel"], None]) -> None:
        """Use the channel on the event loop; call *on_lost* if the device process ends it."""
        self._on_lost = on_lost
        self._connection.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self, self._connection)

    def close(self, reason: HttpError) -> None:
        """Refuse all images with *reason* and end the channel."""
        self._ended_with = reason
        if self.is_open:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept images from now on."""
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Refuse all images: the device process has ended, or this end was closed."""
        self.is_open = False
        for future, _ in self._images.values():
            settle(future, self._ended_with)

        if self._ended_with is results.RUNTIME_DEAD:
            self._on_lost(self)

    @property
    def queue_length(self) -> int:
        """The number of images of this front end that the device process has not answered."""
        return len(self._images)

    async def run(
        self,
        number: int,
        pixels: NDArray[np.uint8],
        deadline: float,
        *,
        features: bool,
    ) -> ImageResult:
        """Run an image with the model *number*, as `Model.run` does."""
        # Copy the pixels into a free slot.
        if not self._free_slots:
            raise RejectedError(results.QUEUE_FULL)
        slot = self._free_slots.pop()  # freed last, so that few pages of the memory are touched
        self._slots.pixels(slot, pixels.shape)[...] = pixels

        # Send the record, and wait for the answer.
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ImageResult | HttpError] = loop.create_future()
        timer = loop.call_at(deadline, settle, future, results.DEADLINE)

        shapes = self._shapes[number][features]
        image = self._images[slot] = future, shapes
        self.sent += 1

        flags = channel.FEATURES if features else 0
        self._send(channel.RUN, flags, number, slot, deadline)

        try:
            result = await future
        finally:
            timer.cancel()
            # Cancel an image without an answer; the one that then comes frees the slot.
            if self._images.get(slot) is image:
                self._send(channel.CANCEL, 0, number, slot, 0.0)

        if isinstance(result, HttpError):
            raise RejectedError(result)
        return result

    def _send(self, *request: float) -> None:
        """Send a record at the end of this turn of the loop, with others."""
        if not self._requests:
            asyncio.get_running_loop().call_soon(self._flush)
        self._requests += channel.REQUEST.pack(*request)

    def _flush(self) -> None:
        requests = self._requests
        self._requests = bytearray()
        if self.is_open:
            self._transport.write(requests)

    def data_received(self, data: bytes) -> None:
        """Pass on the results of images and free their slots."""
        data = self._rest + data
        whole = len(data) - len(data) % channel.RESULT.size
        self._rest = data[whole:]

        for slot, batch_size, queue, infer in channel.RESULT.iter_unpack(
            memoryview(data)[:whole]
        ):
            future, shapes = self._images.pop(slot)
            if batch_size == channel.FAILED:
                settle(future, self._slots.read_error(slot))
            else:
                outputs = self._slots.read_outputs(slot, shapes)
                seconds = {"queue": queue, "infer": infer}
                settle(future, ImageResult(outputs, seconds, batch_size))

            self._free_slots.append(slot)


class RemoteModel(Model):
    """A model that device processes run; *routes* are channels to them, each with the number of the model there."""

    def __init__(self, routes: Sequence[tuple[DeviceChannel, int]], settings: Settings) -> None:
        """Describe the model as the last of *routes* does, which is the newest channel; there is at least one."""
        self.routes = routes
        newest, number = routes[-1]
        facts = newest.models[number]
        super().__init__(facts.name, facts.bundle, facts.runtime, facts.timings, settings)
        self._last_batch = (0, 0.0)  # its size and seconds, of which each of its images tells

    @property
    def is_down(self) -> bool:
        """Whether no device process runs that has the model."""
        return not any(to_device.is_open for to_device, _ in self.routes)

    @property
    def num_devices(self) -> int:
        """How many device processes run that have the model; 1 while none does."""
        return max(1, sum(to_device.is_open for to_device, _ in self.routes))

    async def run(
        self,
        pixels: NDArray[np.uint8],
        deadline: float,
        *,
        features: bool = False,
    ) -> ImageResult:
        """Let the device process with the fewest unanswered images of this front end run it.

        Records the time of its batch.
        """
        routes = [(to_device, number) for to_device, number in self.routes if to_device.is_open]
        if not routes:
            raise RejectedError(results.RUNTIME_DEAD)

        # Of equally short queues, take the one whose device process was sent the fewest images.
        to_device, number = min(
            routes, key=lambda route: (route[0].queue_length, route[0].sent)
        )
        ran = await to_device.run(number, pixels, deadline, features=features)

        # Every image of a batch tells its size and seconds; they are recorded with the first.
        batch = ran.batch_size, ran.stage_seconds["infer"]
        if batch != self._last_batch:
            self._last_batch = batch
            self.pace.record(*batch)
        return ran


class RemoteRegistry(Registry):
    """The models of device processes, which the supervisor replaces when they end."""

    def __init__(self, channels: Iterable[DeviceChannel], settings: Settings) -> None:
        """Use the models at the other ends of *channels*, one for each device process.

        `lost` are the device processes to which another channel is needed.
        """
        self.lost: set[str] = set()
        self.metrics = Metrics()
        self._settings = settings

        # By name of the device process; the newest last.
        self._channels = {to_device.device_process: to_device for to_device in channels}
        self._by_name: dict[str, RemoteModel] = {}
        self._in_use: set[RemoteModel] = set()  # also of channels that were replaced
        self._retiring: set[asyncio.Task[None]] = set()
        self._attaching = asyncio.Lock()  # keeps the order of channels
        self._update_models()

    @property
    def problem(self) -> State | None:
        """`engine_starting` while a model has no device process that runs."""
        return (
            "engine_starting"
            if any(model.is_down for model in self._by_name.values())
            else None
        )

    async def start(self) -> None:
        """Open the channels."""
        for to_device in self._channels.values():
            await to_device.open(self._lose)

    async def reload(self, sources: Iterable[str | Path]) -> bool:  # noqa: ARG002
        """Do nothing: device processes reload their bundles, and then send new channels."""
        return True

    def close(self, reason: HttpError) -> None:
        """Give *reason* to every image without an outcome, also in channels that were replaced."""
        channels = {to_device for model in self._in_use for to_device, _ in model.routes}
        for to_device in channels.union(self._channels.values()):
            to_device.close(reason)

    async def stop(self) -> None:
        """Close all channels."""
        for task in self._retiring:
            task.cancel()
        self.close(results.DRAINING)

    @contextmanager
    def use(self, model: Model) -> Iterator[None]:
        """Keep the channels of *model* open during the block."""
        remote = cast(RemoteModel, model)

        self._in_use.add(remote)
        try:
            with super().use(model):
                yield
        finally:
            if not remote.users:
                self._in_use.discard(remote)

    @property
    def num_sent(self) -> int:
        """How many images device processes have."""
        return sum(one.queue_length for one in tuple(self._channels.values()))

    def _lose(self, lost: DeviceChannel) -> None:
        """Note that another channel is needed, also if the lost one was about to be closed."""
        self.lost.add(lost.device_process)

    async def attach(self, device_process: str, connection: socket.socket) -> None:
        """Use the channel at *connection* to *device_process*; close the earlier one after its last request."""
        self.lost.discard(device_process)

        # Open the new channel, and use it from now on.
        async with self._attaching:
            try:
                new = await asyncio.to_thread(DeviceChannel, device_process, connection)
            except ChannelError as error:
                log.warning("no channel to device process %s", error)
                self.lost.add(device_process)
                return

            await new.open(self._lose)
            old = self._channels.pop(device_process, None)
            self._channels[device_process] = new
            self._update_models()

        if old is not None:
            start_task(self._retiring, self._retire(old))

    async def _retire(self, old: DeviceChannel) -> None:
        """Close *old* after the last request of a model that may use it."""
        for model in list(self._in_use):
            if any(to_device is old for to_device, _ in model.routes):
                await model.unused.wait()
        old.close(results.DRAINING)

    def _update_models(self) -> None:
        """Serve the models of the channels, each in the version of the newest channel that has it."""
        # The channels to each version of a model, with the position of the model there.
        routes: dict[tuple[str, str], list[tuple[DeviceChannel, int]]] = {}
        versions: dict[str, str] = {}

        # `attach` keeps the newest channel last, so its version remains in `versions`.
        for to_device in self._channels.values():
            for position, facts in enumerate(to_device.models):
                version = facts.bundle.manifest.id
                versions[facts.name] = version
                routes.setdefault((facts.name, version), []).append((to_device, position))

        self._by_name = {
            name: RemoteModel(routes[name, versions[name]], self._settings) for name in versions
        }
