"""The channel between front ends and a device process, in one process: answers, cancellation, and nonsense."""

import asyncio
import errno
import itertools
import math
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import EMBEDDING, TensorRecord
from sopdeploy_service.devices import channel, control
from sopdeploy_service.devices.device_process import DeviceProcess
from sopdeploy_service.devices.remote import DeviceChannel, RemoteModel, RemoteRegistry
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import ImageResult, Registry, RuntimeFacts
from sopdeploy_service.inference.model_registry import ModelRegistry
from sopdeploy_service.inference.results import DRAINING, RejectedError
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.runtimes import Failing, Held

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
SETTINGS = Settings(queue_size=8, max_images=8, drain_seconds=0.1)
FOREVER = 1e9  # a deadline


class EngineUnderTest:
    """A device process on the event loop of the test, and the supervisor's end of its control socket."""

    def __init__(
        self, registry: Registry, settings: Settings = SETTINGS, name: str = "engine"
    ) -> None:
        self.supervisor, theirs = control.socket_pair()
        self.name = name
        self.device_process = DeviceProcess(registry, settings, theirs, (), {})
        self._theirs = theirs
        self.running = asyncio.get_running_loop().create_task(self.device_process.run())

    async def connect(self) -> socket.socket:
        """Return a front end's end of a new channel."""
        theirs, ours = socket.socketpair()
        await self.device_process.connect("front-0", theirs)
        return ours

    async def open(self) -> DeviceChannel:
        """Return a front end's channel."""
        ours = await self.connect()
        return await asyncio.to_thread(DeviceChannel, self.name, ours)

    def messages(self) -> list[tuple[bytes, bytes]]:
        """Return what the device process has sent to the supervisor: kinds, each with the rest."""
        found = []
        while (message := control.receive_message(self.supervisor)).kind:
            found.append(message[:2])
        return found

    async def end(self) -> int:
        """Let the supervisor leave, and return the exit code of the device process."""
        self.supervisor.close()
        code = await asyncio.wait_for(self.running, 60)
        self._theirs.close()
        return code


def registry_of(bundle: Bundle, runtime: Runtime) -> ModelRegistry:
    return ModelRegistry(
        {"tiny": LoadedModel(bundle=bundle, runtime=runtime, replays={})}, SETTINGS
    )


def run_with(
    runtime: Runtime,
    bundle: Bundle,
    scenario: Callable[[EngineUnderTest, RemoteRegistry], Awaitable[None]],
) -> None:
    """Run *scenario* with a device process and the models of a front end."""

    async def run() -> None:
        device_process = EngineUnderTest(registry_of(bundle, runtime))
        registry = RemoteRegistry([await device_process.open()], SETTINGS)
        await registry.start()
        await scenario(device_process, registry)
        await registry.stop()
        assert await device_process.end() == 0

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def test_the_outputs_of_an_image_do_not_depend_on_its_slot(bundle) -> None:
    expected = FakeRuntime(num_classes=7).run(PIXELS)["logits"]

    async def scenario(_device_process: EngineUnderTest, registry: RemoteRegistry) -> None:
        model = registry.find("tiny", bundle.manifest.id)
        for _ in range(3):
            found = await asyncio.gather(*(model.run(one, FOREVER) for one in PIXELS))
            assert all(
                (one.outputs["logits"] == row).all()
                for one, row in zip(found, expected, strict=True)
            )
            assert {name for one in found for name in one.stage_seconds} == {"queue", "infer"}
            assert {type(one.batch_size) for one in found} == {int}
        assert 0 < model.pace.batch_seconds(1) < math.inf

    run_with(FakeRuntime(num_classes=7), bundle, scenario)


class ChannelOfTests:
    """A channel to a device process that runs each image at once, in batches of two that take 0.5 s."""

    def __init__(self, bundle: Bundle) -> None:
        runtime = RuntimeFacts("fake", "cpu", 8)
        self.models = [channel.ModelFacts("tiny", bundle, runtime, ())]
        self.is_open = True
        self.queue_length = 0
        self.sent = 0

    async def run(self, *_: object, **_options: object) -> ImageResult:
        self.sent += 1
        return ImageResult({}, {"infer": 0.5}, 2)


def test_of_equal_queues_the_device_process_with_fewer_images_is_chosen(bundle) -> None:
    channels = [ChannelOfTests(bundle) for _ in range(2)]
    model = RemoteModel([(one, 0) for one in channels], SETTINGS)  # type: ignore[misc]
    for _ in range(4):
        asyncio.run(model.run(PIXELS[0], FOREVER))

    assert [one.sent for one in channels] == [2, 2]


def test_the_time_of_a_batch_is_recorded_once_for_all_its_images(bundle, monkeypatch) -> None:
    model = RemoteModel([(ChannelOfTests(bundle), 0)], SETTINGS)  # type: ignore[list-item]
    recorded = []
    monkeypatch.setattr(model.pace, "record", lambda *batch: recorded.append(batch))
    for _ in range(2):
        asyncio.run(model.run(PIXELS[0], FOREVER))

    assert recorded == [(2, 0.5)]


def test_an_image_that_fails_has_the_error_of_the_engine(bundle) -> None:
    async def scenario(_device_process: EngineUnderTest, registry: RemoteRegistry) -> None:
        model = registry.find()
        codes = []
        for _ in range(3):
            try:
                await model.run(PIXELS[0], FOREVER)
                codes.append("ok")
            except RejectedError as error:
                codes.append(error.reason.code)
        assert codes == ["nonfinite_output", "out_of_memory", "ok"]

    run_with(Failing({1: "nan", 2: "oom"}), bundle, scenario)


class WithFeatures(FakeRuntime):
    """Also returns an embedding, the first two logits."""

    def run(self, images):
        logits = super().run(images)["logits"]
        return {"logits": logits, EMBEDDING: logits[:, :2].copy()}


def test_the_embedding_is_sent_if_it_was_requested(bundle) -> None:
    record = TensorRecord(name=EMBEDDING, dtype="float32", shape=(None, 2))
    manifest = bundle.manifest.model_copy(
        update={"outputs": (*bundle.manifest.outputs, record)}
    )

    async def scenario(_device_process: EngineUnderTest, registry: RemoteRegistry) -> None:
        plain, full = await asyncio.gather(
            registry.find().run(PIXELS[0], FOREVER),
            registry.find().run(PIXELS[1], FOREVER, features=True),
        )
        assert set(plain.outputs) == {"logits"}
        assert (full.outputs[EMBEDDING] == full.outputs["logits"][:2]).all()

    run_with(WithFeatures(num_classes=7), replace(bundle, manifest=manifest), scenario)


def test_a_slot_is_free_when_the_engine_has_read_it(bundle) -> None:
    runtime = Held(largest_batch=1)

    async def scenario(device_process: EngineUnderTest, registry: RemoteRegistry) -> None:
        model = cast(RemoteModel, registry.find())
        (front_end,) = device_process.device_process.front_ends
        ((own_end, _),) = model.routes
        in_batch = asyncio.ensure_future(model.run(PIXELS[0], FOREVER))
        await until(runtime.entered.is_set)
        queued = [asyncio.ensure_future(model.run(one, FOREVER)) for one in PIXELS[1:]]
        await until(lambda: len(front_end.cancel_by_slot) == 16)
        with pytest.raises(RejectedError, match="queue is full"):
            await model.run(PIXELS[0], FOREVER)
        for each in (in_batch, *queued):
            each.cancel()
        # That of the batch
        await until(lambda: len(front_end.cancel_by_slot) == own_end.queue_length == 1)
        with pytest.raises(RejectedError, match="deadline"):
            await model.run(PIXELS[0], 0.0)
        runtime.gate.set()
        await until(lambda: not front_end.cancel_by_slot and not own_end.queue_length)
        await asyncio.gather(*(model.run(one, FOREVER) for one in PIXELS))

    run_with(runtime, bundle, scenario)


def record(
    kind: int = channel.RUN, number: int = 0, slot: int = 0, deadline: float = FOREVER
) -> bytes:
    return channel.REQUEST.pack(kind, 0, number, slot, deadline)


class Counting(FakeRuntime):
    """Counts the images that it has run."""

    count = 0

    def run(self, images):
        self.count += len(images)
        return super().run(images)


def test_a_front_end_that_reads_no_results_is_cut_off(bundle, monkeypatch) -> None:
    monkeypatch.setattr(channel, "MAX_UNSENT_BYTES", 1000)
    runtime = Counting(num_classes=7)

    async def scenario(device_process: EngineUnderTest, registry: RemoteRegistry) -> None:
        bad = await device_process.connect()
        await asyncio.to_thread(channel.receive_opening, bad)
        bad.setblocking(False)
        front_ends = device_process.device_process.front_ends

        def have_answers(num_sent: int) -> bool:
            is_answered = not any(one.cancel_by_slot for one in front_ends)
            return len(front_ends) == 1 or (runtime.count == num_sent and is_answered)

        images = b"".join(record(slot=slot) for slot in range(16))
        for num_sent in itertools.count(16, 16):
            with suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(bad, images)
            await until(lambda num_sent=num_sent: have_answers(num_sent))
            if len(front_ends) == 1:
                break

        bad.close()
        await registry.find().run(PIXELS[0], FOREVER)

    run_with(runtime, bundle, scenario)


HARMLESS = {
    "a cancellation of another slot": record() + record(channel.CANCEL, 65_535, 2**32 - 1),
    "half a record": record()[:7],
    "an image whose deadline has passed": record(deadline=0.0),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_front_end_that_ends_at_any_moment_leaves_nothing_behind(bundle, name) -> None:
    async def scenario(device_process: EngineUnderTest, registry: RemoteRegistry) -> None:
        other = await device_process.connect()
        await asyncio.to_thread(channel.receive_opening, other)
        other.sendall(HARMLESS[name])
        other.close()
        await until(lambda: len(device_process.device_process.front_ends) == 1)
        await registry.find().run(PIXELS[0], FOREVER)
        (model,) = device_process.device_process.registry.models()
        assert model.users == 1  # the channel that is left

    run_with(FakeRuntime(num_classes=7), bundle, scenario)


def test_a_dead_runtime_refuses_all_images_and_ends_the_engine(bundle) -> None:
    async def run() -> None:
        device_process = EngineUnderTest(
            registry_of(bundle, Failing({1: SystemExit("the device is gone")}))
        )
        registry = RemoteRegistry([await device_process.open()], SETTINGS)
        await registry.start()
        found = await asyncio.gather(
            *(registry.find().run(one, FOREVER) for one in PIXELS), return_exceptions=True
        )
        assert {error.reason.code for error in found} == {"runtime_dead"}
        assert await device_process.end() == 70
        await until(lambda: registry.problem == "engine_starting")
        await registry.stop()

    asyncio.run(run())


def test_an_image_goes_to_the_engine_with_the_shortest_queue(bundle) -> None:
    runtimes = [Held(), Held()]

    async def run() -> None:
        device_processes = [
            EngineUnderTest(registry_of(bundle, runtime), name=str(number))
            for number, runtime in enumerate(runtimes)
        ]
        channels = [await device_process.open() for device_process in device_processes]
        registry = RemoteRegistry(channels, SETTINGS)
        await registry.start()
        model = registry.find()

        # Six images go to both alike, because neither finishes one.
        images = []
        for pixels in PIXELS[:6]:
            images.append(asyncio.ensure_future(model.run(pixels, FOREVER)))
            await asyncio.sleep(0)
        assert [one.queue_length for one in channels] == [3, 3]
        assert model.num_devices == 2

        # The first one becomes free and gets all others.
        runtimes[0].gate.set()
        await until(lambda: channels[0].queue_length == 0)
        images += [asyncio.ensure_future(model.run(pixels, FOREVER)) for pixels in PIXELS[6:8]]
        await asyncio.wait(images[-2:])  # the other device process is held
        runtimes[1].gate.set()
        await asyncio.gather(*images)

        # After it has ended, the other one gets them.
        assert await device_processes[0].end() == 0  # though a front end is left
        await until(lambda: not channels[0].is_open)
        assert model.num_devices == 1
        await model.run(PIXELS[0], FOREVER)  # by the other one
        await registry.stop()
        await device_processes[1].end()

    asyncio.run(run())


def test_the_end_of_a_drain_refuses_images_in_a_replaced_channel(bundle) -> None:
    runtime = Held(largest_batch=1)

    async def scenario(device_process: EngineUnderTest, registry: RemoteRegistry) -> None:
        model = registry.find()

        async def request() -> None:
            with registry.use(model):
                await model.run(PIXELS[0], FOREVER)

        waiting = asyncio.ensure_future(request())
        await until(runtime.entered.is_set)
        await registry.attach(device_process.name, await device_process.connect())
        assert registry.find() is not model
        registry.close(DRAINING)
        await until(waiting.done)
        with pytest.raises(RejectedError, match="shutting down"):
            await waiting
        runtime.gate.set()

    run_with(runtime, bundle, scenario)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory"),
        (OSError(errno.EPIPE, os.strerror(errno.EPIPE)), None),  # the front end has ended
        (channel.ChannelError("the models need 9 bytes"), "the models need 9 bytes"),
    ],
    ids=["no memory", "no front end", "too many models"],
)
def test_a_device_process_that_cannot_open_a_channel_ends_it(
    bundle, monkeypatch, caplog, error, reason
) -> None:
    def refuse(*_given: object) -> None:
        raise error

    async def scenario(device_process: EngineUnderTest, _registry: RemoteRegistry) -> None:
        monkeypatch.setattr(channel, "open_channel", refuse)
        with await device_process.connect() as ours:
            assert ours.recv(1) == b""
        assert len(device_process.device_process.front_ends) == 1

    run_with(FakeRuntime(num_classes=7), bundle, scenario)
    expected = [f"front end front-0: has no channel ({reason})"] if reason else []
    assert [line for line in caplog.messages if "has no channel" in line] == expected


def test_an_engine_sends_no_models_that_a_front_end_would_not_read(bundle, monkeypatch) -> None:
    facts = [
        channel.ModelFacts.describe(registry_of(bundle, FakeRuntime(num_classes=7)).find())
    ]
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(channel, "MAX_MODELS_BYTES", 10)

    with ours, theirs, pytest.raises(channel.ChannelError, match=r"\d+ bytes, more"):
        channel.open_channel(theirs, facts, 2)


@pytest.mark.parametrize("supervisor_reads", [True, False])
def test_the_supervisor_learns_of_new_models_after_a_pause(
    bundle, monkeypatch, supervisor_reads: bool
) -> None:
    reloaded = registry_of(bundle, FakeRuntime(num_classes=7))

    async def scenario(device_process: EngineUnderTest, _registry: RemoteRegistry) -> None:
        tested = device_process.device_process
        before = tested.registry

        async def reload(_sources: object) -> bool:
            monkeypatch.setattr(before, "models", reloaded.models)
            return True

        monkeypatch.setattr(before, "reload", reload)
        while not supervisor_reads and control.send_message(tested._supervisor, b"other"):
            pass
        await tested._reload()
        tested._report()

        kinds = [kind for kind, _ in device_process.messages()]
        assert (control.NEW_MODELS in kinds) == supervisor_reads
        tested._report()
        kinds = [kind for kind, _ in device_process.messages()]
        assert (control.NEW_MODELS in kinds) != supervisor_reads

    run_with(FakeRuntime(num_classes=7), bundle, scenario)
