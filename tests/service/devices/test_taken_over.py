"""What one process of a server can do to the others if an attacker runs code in it."""

import asyncio
import ctypes
import fcntl
import mmap
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.sealed import CONTENT, SIZE, create_memory, map_memory, read_memory
from sopdeploy_service.decoding import pool
from sopdeploy_service.devices import channel, control, processes, supervisor
from sopdeploy_service.devices.control import Status
from sopdeploy_service.devices.processes import LaunchConfig, Process
from sopdeploy_service.devices.remote import EngineChannel, RemoteRegistry
from sopdeploy_service.inference.results import QUEUE_FULL, RejectedError
from sopdeploy_service.settings import Settings, load_settings
from tests.service.devices.test_engine import (
    FOREVER,
    PIXELS,
    EngineUnderTest,
    registry_of,
    until,
)
from tests.support.fake_runtime import FakeRuntime

LIBC = ctypes.CDLL(None, use_errno=True)
PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def reopen(file: int) -> int:
    return os.open(f"/proc/self/fd/{file}", os.O_RDWR)


def punch_hole(file: int) -> None:
    if LIBC.fallocate(file, PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "fallocate")


RESIZES: dict[str, Callable[[int], object]] = {
    "shrink": lambda file: os.ftruncate(file, 0),
    "grow": lambda file: os.ftruncate(file, 1 << 20),
    "append": lambda file: os.pwrite(file, b"x", 8192),
    "shrink after a second open": lambda file: os.ftruncate(reopen(file), 0),
    "open and truncate": lambda file: os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_TRUNC),
    "keep later processes from writing": lambda file: fcntl.fcntl(
        file, fcntl.F_ADD_SEALS, 0x10
    ),
}
WRITES: dict[str, Callable[[int], object]] = {
    "write": lambda file: os.pwrite(file, b"x", 0),
    "write after a second open": lambda file: os.pwrite(reopen(file), b"x", 0),
    "map for writing": lambda file: mmap.mmap(file, 0),
    "punch a hole": punch_hole,
}


@pytest.mark.parametrize("content", [8192, [bytes(8192)]], ids=["size", "content"])
@pytest.mark.parametrize("name", [*RESIZES, *WRITES])
def test_no_process_changes_the_size_of_shared_memory_or_what_was_written_once(
    content, name
) -> None:
    file = create_memory("test", content)
    if name in RESIZES or content != 8192:
        with pytest.raises(PermissionError):
            {**RESIZES, **WRITES}[name](file)
    assert fcntl.fcntl(file, fcntl.F_GET_SEALS) == (SIZE if content == 8192 else CONTENT)
    memory = map_memory(os.dup(file)) if content == 8192 else read_memory(os.dup(file))
    os.close(file)
    assert len(memory) == 8192


def unsealed(size: int = 8192, seals: int = 0) -> int:
    file = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def temporary_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(8192))
        file.flush()
        return os.dup(file.fileno())


# Files that a process may send instead of shared memory.
WRONG_FILES: dict[str, Callable[[], int]] = {
    "a pipe that nobody writes to": lambda: os.pipe()[0],
    "a socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "a device without an end": lambda: os.open("/dev/zero", os.O_RDONLY),
    "a file on a disk": temporary_file,
    "memory without seals": unsealed,
    "memory that may shrink": lambda: unsealed(seals=fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL),
    "memory that may still be written": lambda: unsealed(seals=fcntl.F_SEAL_SHRINK),
    "a folder": lambda: os.open("/", os.O_RDONLY),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_of_another_kind_is_neither_mapped_nor_read_and_closed(name) -> None:
    for use in (map_memory, read_memory):
        file = WRONG_FILES[name]()
        with pytest.raises(OSError):  # noqa: PT011 - whatever the system calls it
            use(file)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


class Server:
    """A supervisor with an engine and two front ends, whose ends of the control sockets are *ends*."""

    def __init__(self, stack: ExitStack) -> None:
        settings = load_settings(front_ends=2, keep="kept")
        engine = Process("engine", {}, settings, "", 0)
        self.front_ends = [
            Process(f"front-{number}", {}, settings, None, number) for number in range(2)
        ]
        self.processes = {process.name: process for process in (engine, *self.front_ends)}
        listener = stack.enter_context(socket.socket())
        self.supervisor = supervisor.Supervisor([], settings, [engine], listener)
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


STATUS = control.STATUS + b" "
READY = control.COUNTS.pack(0, 0, True, 0)


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
    assert record.message.startswith("engine, front-0, front-1: a message is too long")


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
            server.supervisor._keys = SimpleNamespace(files=(-2, -3))
            monkeypatch.setattr(server.supervisor._template, "start", start)
            with pytest.raises(BlockingIOError):
                await server.supervisor._start(server.processes[name])

    asyncio.run(scenario())
    assert files == ([-1, -2, -3] if has_keys else [])


def test_files_that_a_process_sends_unasked_are_closed_by_the_kernel() -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            server = Server(stack)
            reading, writing = os.pipe()
            for _ in range(50):
                status = STATUS + READY
                socket.send_fds(server.ends["front-1"], [status], [writing] * 200)
                server.receive("front-1")
            os.close(writing)
            assert os.read(reading, 1) == b""  # no other end of the pipe is open
            os.close(reading)
            assert server.killed == []

    asyncio.run(scenario())


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


def test_a_process_that_does_not_read_gets_no_more_connections_and_others_do() -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            server = Server(stack)
            sent = [
                server.processes["front-1"].send(control.CLIENT, b"", 0) for _ in range(1000)
            ]
            assert not sent[-1]
            assert server.processes["front-0"].send(control.CLIENT, b"", 0)

    asyncio.run(scenario())


def opening(slots: int, outputs: int, pixels: int, size: int) -> bytes:
    return channel.OPENING.pack(slots, outputs, pixels, size)


OPENINGS: dict[str, tuple[bytes, Callable[[], int] | None]] = {
    "half an opening": (b"half", None),
    "no memory": (opening(16, 1024, 4096, 2) + b"[]", None),
    **{f"instead of memory {name}": (opening(1, 4096, 4096, 2) + b"[]", WRONG_FILES[name])
       for name in list(WRONG_FILES)[:6]},
    "less memory than announced": (opening(16, 1024, 4096, 2) + b"[]", lambda: create_memory("x", 4096)),
    "slots without a number": (opening(2**22, 1, 0, 2), lambda: create_memory("x", 2**22)),
    "no slots": (opening(0, 0, 0, 2) + b"[]", lambda: create_memory("x", 0)),
    "endless models": (opening(1, 4096, 4096, 2**32 - 1), lambda: create_memory("x", 8192)),
    "models that end early": (opening(1, 4096, 4096, 100) + b"[", lambda: create_memory("x", 8192)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPENINGS)
def test_a_front_end_keeps_its_engines_whatever_another_one_sends_first(
    bundle, name, caplog
) -> None:
    sent, make = OPENINGS[name]

    async def scenario() -> None:
        engine = EngineUnderTest(registry_of(bundle, FakeRuntime(num_classes=7)))
        registry = RemoteRegistry([await engine.open()], Settings())
        await registry.start()
        theirs, ours = socket.socketpair()
        files = [] if make is None else [make()]
        socket.send_fds(theirs, [sent], files)
        for file in files:
            os.close(file)
        theirs.shutdown(socket.SHUT_WR)
        await registry.attach("other", ours)
        theirs.close()
        await registry.find().run(PIXELS[0], FOREVER)
        await registry.stop()
        assert await engine.end() == 0

    asyncio.run(scenario())
    assert [record.exc_info for record in caplog.records] == [None]
    assert caplog.messages[0].startswith("no channel to device process other: ")


def test_an_engine_that_opens_its_channel_never_delays_no_other_one(
    bundle, monkeypatch
) -> None:
    monkeypatch.setattr(channel, "OPENING_SECONDS", 0.1)

    async def scenario() -> None:
        engine = EngineUnderTest(registry_of(bundle, FakeRuntime(num_classes=7)))
        registry = RemoteRegistry([await engine.open()], Settings())
        await registry.start()
        theirs, ours = socket.socketpair()
        with theirs:
            await registry.attach("other", ours)
        await registry.attach("engine", await engine.connect())
        await registry.stop()
        assert await engine.end() == 0

    asyncio.run(scenario())


async def connect_engine(
    bundle: Bundle,
) -> tuple[socket.socket, channel.Slots, RemoteRegistry]:
    """Start a front end whose engine, with four slots, is the test: its socket, its slots, the front end."""
    theirs, ours = socket.socketpair()
    model = registry_of(bundle, FakeRuntime(num_classes=7)).find()
    slots, described = channel.open_channel(theirs, [channel.ModelFacts.describe(model)], 4)
    theirs.sendall(described)
    engine = await asyncio.to_thread(EngineChannel, "engine", ours)
    registry = RemoteRegistry([engine], Settings())
    await registry.start()
    return theirs, slots, registry


def test_an_engine_that_never_answers_gets_no_more_images_than_it_has_slots(bundle) -> None:
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
