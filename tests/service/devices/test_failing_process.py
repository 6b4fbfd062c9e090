"""A process of a server that fails, hangs or does not read changes nothing for the others."""

import asyncio
import errno
import os
import socket
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.decoding import pool
from sopdeploy_service.devices import channel, channels, control, processes, supervisor
from sopdeploy_service.devices.control import Status
from sopdeploy_service.devices.processes import LaunchConfig, Process
from sopdeploy_service.devices.remote import DeviceChannel, RemoteRegistry
from sopdeploy_service.devices.shared_keys import SharedKeys
from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.inference.results import DRAINING, QUEUE_FULL, RejectedError
from sopdeploy_service.settings import Settings, load_settings
from tests.service.devices.test_device_process import (
    FOREVER,
    PIXELS,
    EngineUnderTest,
    registry_of,
    until,
)
from tests.service.devices.test_supervisor import TimelessLoop
from tests.support.children import num_open_files
from tests.support.fake_runtime import FakeRuntime


class Server:
    """A supervisor with a device process and two front ends, whose ends of the control sockets are *ends*."""

    def __init__(self, stack: ExitStack) -> None:
        settings = load_settings(front_ends=2, keep="kept")
        device_process = Process("engine", {}, settings, "", 0)
        self.front_ends = [
            Process(f"front-{number}", {}, settings, None, number) for number in range(2)
        ]
        self.processes = {
            process.name: process for process in (device_process, *self.front_ends)
        }
        listener = stack.enter_context(socket.socket())
        self.supervisor = supervisor.Supervisor([], settings, [device_process], listener)
        self.supervisor._front_ends = self.front_ends
        self.supervisor._channels.front_ends = self.front_ends
        self.supervisor._loop = asyncio.get_running_loop()
        self.killed: list[str] = []
        self.ends: dict[str, socket.socket] = {}
        for name, process in self.processes.items():
            ours, self.ends[name] = map(stack.enter_context, control.socket_pair())
            process.reset(ours)
            kill = lambda name=name: self.killed.append(name)  # noqa: E731
            process.child = SimpleNamespace(kill=kill, poll=lambda: None, pid=os.getpid())
            process.record_status(Status(0, 0, ""))

    def receive(self, name: str, count: int = 1) -> None:
        for _ in range(count):
            self.supervisor._receive(self.processes[name])


async def send_again(server: Server) -> None:
    """Send channels again, once."""
    again = asyncio.ensure_future(server.supervisor._channels.send_again())
    await asyncio.sleep(1.5 * channels.RETRY_SECONDS)
    again.cancel()


STATUS = control.STATUS + b" "


def test_processes_that_fail_at_once_are_named_in_one_line(caplog) -> None:
    async def scenario() -> list[str]:
        with ExitStack() as stack:
            server = Server(stack)
            for name in server.processes:
                server.ends[name].send(STATUS + bytes(control.MAX_MESSAGE))
                server.receive(name)
            while not caplog.records:
                await asyncio.sleep(0)
            return server.killed

    assert asyncio.run(scenario()) == ["engine", "front-0", "front-1"]
    (record,) = caplog.records
    assert record.message.startswith("engine, front-0, front-1: ")


@pytest.mark.parametrize(("name", "has_keys"), [("engine", False), ("front-1", True)])
def test_only_a_process_that_serves_clients_gets_the_keys(name, has_keys, monkeypatch) -> None:
    files: list[int] = []

    async def start(_config: LaunchConfig, _control: int, *shared: int) -> None:
        files.extend(shared)
        raise BlockingIOError

    async def scenario() -> None:
        with ExitStack() as stack:
            server = Server(stack)
            server.supervisor._shared = -1
            server.supervisor._keys = SharedKeys(())
            stack.callback(server.supervisor._keys.close)
            monkeypatch.setattr(server.supervisor._template, "start", start)
            num_open = num_open_files()
            with pytest.raises(BlockingIOError):
                await server.supervisor._start(server.processes[name])
            assert num_open_files() == num_open

    asyncio.run(scenario())
    assert (files[:1], len(files)) == (([-1], 3) if has_keys else ([], 0))


@pytest.mark.parametrize("message", [b"", b" "])
def test_a_process_that_leaves_and_stays_is_killed(message, monkeypatch) -> None:
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 0.0)

    async def scenario() -> list[str]:
        with ExitStack() as stack:
            server = Server(stack)
            server.ends["front-1"].send(message)
            server.receive("front-1")
            assert server.processes["front-1"].control is None
            hanging = asyncio.ensure_future(server.supervisor._replace_failing())
            await until(lambda: bool(server.killed))
            hanging.cancel()
            return server.killed

    assert set(asyncio.run(scenario())) == {"front-1"}


@pytest.mark.parametrize(("num_left", "is_ended"), [(2, False), (1, False), (0, True)])
def test_a_device_process_ends_with_the_last_front_end(num_left: int, is_ended: bool) -> None:
    async def scenario() -> bool:
        with ExitStack() as stack:
            server = Server(stack)
            for process in server.front_ends[num_left:]:
                process.child = None
            server.supervisor._end_unused_devices()
            return server.processes["engine"].control is None

    assert asyncio.run(scenario()) is is_ended


def test_a_process_that_does_not_read_gets_no_more_connections() -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            server = Server(stack)
            sent = [
                server.processes["front-1"].send(control.CLIENT, b"", 0) for _ in range(1000)
            ]
            assert not sent[-1]
            assert server.processes["front-0"].send(control.CLIENT, b"", 0)

    asyncio.run(scenario())


def test_a_front_end_keeps_its_engines_when_another_one_opens(bundle, caplog) -> None:
    async def scenario() -> None:
        device_process = EngineUnderTest(registry_of(bundle, FakeRuntime(num_classes=7)))
        registry = RemoteRegistry([await device_process.open()], Settings())
        await registry.start()

        theirs, ours = socket.socketpair()
        theirs.send(b"half")
        theirs.close()
        await registry.attach("other", ours)

        await registry.find().run(PIXELS[0], FOREVER)
        await registry.stop()
        assert await device_process.end() == 0

    asyncio.run(scenario())
    assert [record.exc_info for record in caplog.records] == [None]
    assert caplog.messages[0].startswith("no channel to device process other: ")


def test_a_device_process_that_never_opens_its_channel_delays_no_other_one(
    bundle, monkeypatch
) -> None:
    monkeypatch.setattr(channel, "OPENING_SECONDS", 0.1)

    async def scenario() -> None:
        device_process = EngineUnderTest(registry_of(bundle, FakeRuntime(num_classes=7)))
        registry = RemoteRegistry([await device_process.open()], Settings())
        await registry.start()
        theirs, ours = socket.socketpair()

        with theirs:
            await registry.attach("other", ours)

        await registry.attach("engine", await device_process.connect())
        await registry.stop()
        assert await device_process.end() == 0

    asyncio.run(scenario())


async def connect_engine(bundle: Bundle) -> tuple[socket.socket, channel.Slots, RemoteRegistry]:
    """Start a front end whose device process, with four slots, is the test: its socket, its slots, the front end."""
    theirs, ours = socket.socketpair()
    model = registry_of(bundle, FakeRuntime(num_classes=7)).find()
    slots, described = channel.open_channel(theirs, [channel.ModelFacts.describe(model)], 4)
    theirs.sendall(described)
    device_process = await asyncio.to_thread(DeviceChannel, "engine", ours)
    registry = RemoteRegistry([device_process], Settings())
    await registry.start()
    return theirs, slots, registry


def test_an_engine_that_never_answers_gets_no_more_images_than_slots(bundle) -> None:
    async def scenario() -> None:
        theirs, _slots, registry = await connect_engine(bundle)
        model = registry.find()
        waiting = [asyncio.ensure_future(model.run(PIXELS[0], FOREVER)) for _ in range(4)]
        await asyncio.sleep(0)  # each takes a slot
        with pytest.raises(RejectedError) as refused:
            await asyncio.wait_for(model.run(PIXELS[0], FOREVER), 10)
        assert refused.value.reason is QUEUE_FULL
        theirs.close()
        await asyncio.gather(*waiting, return_exceptions=True)
        await registry.stop()

    asyncio.run(scenario())


def test_what_decoders_write_to_the_log_has_a_rate(monkeypatch) -> None:
    pauses: list[float] = []
    reading, writing = os.pipe()
    os.write(writing, b"x" * 60_000)
    os.close(writing)
    monkeypatch.setattr(pool, "time", SimpleNamespace(sleep=pauses.append))
    pool._log_stderr(SimpleNamespace(stderr=os.fdopen(reading, "rb")))

    assert pauses == [pool.LOG_PAUSE_SECONDS]


# What happens to the first of two front ends -> it gets a channel at the next try
NOT_CONNECTED = {
    "the supervisor has no free file": True,
    "it does not read its messages": True,
    "it has left": False,
}


@pytest.mark.parametrize("name", NOT_CONNECTED)
def test_a_channel_that_cannot_be_sent_is_sent_again(monkeypatch, name) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def scenario() -> list[bytes]:
        with ExitStack() as stack:
            server = Server(stack)
            device_process, front_end, _ = server.processes.values()
            end = server.ends["front-0"]

            # The first try fails.
            with monkeypatch.context() as patched:
                if name == "the supervisor has no free file":
                    patched.setattr(channels.socket, "socketpair", refuse)
                elif name == "it has left":
                    server.supervisor._close_control(front_end)
                while name == "it does not read its messages" and front_end.send(b"other"):
                    pass
                server.supervisor._channels.connect_front_ends(device_process)
            while control.receive_message(end).kind == b"other":
                pass

            # A process that takes the place of one that has left is connected when it starts.
            if name == "it has left":
                ours, end = map(stack.enter_context, control.socket_pair())
                front_end.reset(ours)

            # The next one comes though no front end has lost a channel.
            await send_again(server)
            received = control.receive_message(end)
            assert len(received.files) == bool(received.kind)
            for file in received.files:
                os.close(file)

            # It comes once.
            await send_again(server)
            assert control.receive_message(end).kind == b""
            return [received.kind, received.rest]

    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        expected = [b"channel", b"engine"] if NOT_CONNECTED[name] else [b"", b""]
        assert runner.run(scenario()) == expected


# What the first of two front ends has lost; who is ready -> it gets a channel
REPORTED = {
    "the engine": ({"engine"}, {"engine", "front-0"}, True),
    "the engine, before it serves": ({"engine"}, {"engine"}, True),
    "the engine, which starts": ({"engine"}, {"front-0"}, False),
    "another one": ({"other"}, {"engine", "front-0"}, False),
    "nothing": (set(), {"engine", "front-0"}, False),
}


@pytest.mark.parametrize("name", REPORTED)
def test_a_front_end_gets_a_new_channel_to_a_ready_device_process(name) -> None:
    lost, ready, is_sent = REPORTED[name]

    async def scenario() -> None:
        with ExitStack() as stack:
            server = Server(stack)
            if "engine" not in ready:
                server.processes["engine"].bundles = None
            bundles = "" if "front-0" in ready else None
            Status(0, 0, bundles, lost=frozenset(lost)).send(server.ends["front-0"])
            server.receive("front-0")
            await send_again(server)

            for process, other in (("front-0", b"engine"), ("engine", b"front-0")):
                kind, rest, files = control.receive_message(server.ends[process])
                assert (kind, rest) == ((control.CHANNEL, other) if is_sent else (b"", b""))
                for file in files:
                    os.close(file)
            assert control.receive_message(server.ends["front-1"]).kind == b""
            assert server.killed == []

    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        runner.run(scenario())


# Whether each front end works, and its open connections -> which gets the next ones
NEXT = {
    "both work": ([True, True], [0, 5], ["front-0", "front-0"]),
    "the one with fewer does not work": ([False, True], [0, 5], ["front-1", "front-1"]),
    "none works": ([False, False], [0, 5], ["front-0", "front-0"]),
    "the one that works has enough on the way": ([False, True], [0, 99], []),
}


@pytest.mark.parametrize("name", NEXT)
def test_a_front_end_that_does_not_work_gets_no_connections(name) -> None:
    works, num_open, expected = NEXT[name]

    async def scenario() -> list[str]:
        with ExitStack() as stack:
            server = Server(stack)
            for process, is_working, count in zip(
                server.front_ends, works, num_open, strict=True
            ):
                process.record_status(Status(0, count, "", works=is_working))
                process.sent = processes.MAX_ON_THE_WAY if count == 99 else 0

            waiting = [socket.socket() for _ in expected or range(2)]
            for connection in waiting:
                stack.enter_context(connection)
            server.supervisor._arrivals = Waiting(waiting)
            server.supervisor._pass_on()

            found = []
            for process in server.front_ends:
                while (message := control.receive_message(server.ends[process.name])).kind:
                    found.append(process.name)
                    os.close(message.files[0])
            return found

    assert asyncio.run(scenario()) == expected


class Waiting(list[socket.socket]):
    """Connections that wait for a process."""

    def take(self) -> socket.socket:
        return self.pop(0)


def test_a_process_that_cannot_receive_new_keys_is_replaced(tmp_path, monkeypatch) -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            server = Server(stack)
            one = server.supervisor
            one._keys = SharedKeys(())
            stack.callback(lambda: one._keys.close())
            first, second = server.front_ends

            # One does not read its messages; the other says that it has no files for the keys.
            while first.send(b"other"):
                pass
            path = tmp_path / "keys.toml"
            new_key(path, "client")
            one._settings = one._settings.model_copy(update={"keys": path})
            await one._reload_keys()
            assert server.killed == ["front-0"]

            Status(0, 0, "", has_keys=False).send(server.ends["front-1"])
            server.receive("front-1")
            assert server.killed == ["front-0", "front-1"]
            assert second.control is None

    asyncio.run(scenario())


@pytest.mark.parametrize("is_reloaded", [True, False])
def test_keys_are_reloaded_while_a_process_starts_which_then_gets_them(
    tmp_path, monkeypatch, is_reloaded: bool
) -> None:
    path = tmp_path / "keys.toml"
    new_key(path, "client")

    async def scenario() -> None:
        with ExitStack() as stack:
            server = Server(stack)
            one = server.supervisor
            one._shared = -1
            one._settings = one._settings.model_copy(update={"keys": path})
            one._keys = SharedKeys(())
            stack.callback(lambda: one._keys.close())
            starting = server.processes["front-0"]
            child = starting.child

            async def start(_config: LaunchConfig, file: int, *_shared: int) -> object:
                if is_reloaded:
                    await asyncio.wait_for(one._reload_keys(), 60)
                server.ends["new"] = stack.enter_context(socket.socket(fileno=os.dup(file)))
                return child

            monkeypatch.setattr(one._template, "start", start)
            async with one._starting:
                await one._start(starting)
            one._close_control(starting)

            for name in ("new", "front-1"):
                received = [control.receive_message(server.ends[name]) for _ in range(3)]
                kinds = [message.kind for message in received]
                assert (control.KEYS in kinds) == is_reloaded, name
                for file in (file for message in received for file in message.files):
                    os.close(file)

    asyncio.run(scenario())


# What happens to a channel -> whether the front end reports that it lacks one
LOST = {
    "the device process ends it": True,
    "it cannot be opened": True,
    "a new one has come": False,
    "the front end closes it": False,
}


@pytest.mark.parametrize("name", LOST)
def test_a_front_end_lacks_a_lost_channel_until_a_new_one_comes(bundle, name) -> None:
    async def scenario() -> set[str]:
        device_process = EngineUnderTest(registry_of(bundle, FakeRuntime(num_classes=7)))
        lost = await device_process.open()
        registry = RemoteRegistry([lost], Settings())
        await registry.start()

        match name:
            case "it cannot be opened":
                theirs, ours = socket.socketpair()
                theirs.close()
                await registry.attach("engine", ours)
            case "the front end closes it":
                lost.close(DRAINING)
                await until(lambda: not lost.is_open)
            case _:
                for front_end in device_process.device_process.front_ends:
                    front_end.cut_off("it does not read")
                await until(lambda: not lost.is_open)
        if name == "a new one has come":
            await registry.attach("engine", await device_process.connect())

        found = set(registry.lost)
        await registry.stop()
        assert await device_process.end() == 0
        return found

    assert asyncio.run(scenario()) == ({"engine"} if LOST[name] else set())
