"""What one process of a server can do to the others if an attacker runs code in it."""

import asyncio
import ctypes
import fcntl
import json
import logging
import mmap
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.sealed import CONTENT, SIZE, create_memory, map_memory, read_memory
from sopdeploy_service.decoding import pool
from sopdeploy_service.devices import channel, control, processes, supervisor
from sopdeploy_service.devices.control import Status
from sopdeploy_service.devices.processes import LaunchConfig, Process
from sopdeploy_service.devices.remote import EngineChannel, RemoteRegistry
from sopdeploy_service.http.api_keys import TokenBucket
from sopdeploy_service.inference.results import QUEUE_FULL, RUNTIME_DEAD, RejectedError
from sopdeploy_service.inference.service import Service
from sopdeploy_service.labelling.keep import forwarding
from sopdeploy_service.settings import Settings, load_settings
from tests.service.devices.test_engine import (
    FOREVER,
    PIXELS,
    EngineUnderTest,
    registry_of,
    until,
)
from tests.service.labelling.test_kept import record_of
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
# Of a front end: each replaces it, and nothing else.
FORGED: dict[str, bytes] = {
    "new models": b"models",
    "a speed": b"speed 0.001",
    "a client": b"client",
    "a reload": b"reload",
    "a channel": b"channel engine",
    "photographs": b"photos front-0",
    "a number of front ends": b"front-ends 0",
    "metrics of its own": b"send-metrics",
    "a page": b"page",
    "bytes": b"\xff" * 20,
    "zeros": bytes(20),
    "one byte": b"x",
    "a space": b"x ",
    "no counts": STATUS + bytes(11),
    "half a status": control.STATUS,
    "connections that it did not get": STATUS + control.COUNTS.pack(1, 0, True, 0),
    "the most connections": STATUS + control.COUNTS.pack(2**64 - 1, 0, True, 0),
    "fewer numbers than it says": STATUS + control.COUNTS.pack(0, 0, True, 65_535) + bytes(100),
    "a second start": STATUS + control.COUNTS.pack(0, 0, False, 0),
    "a message without an end": STATUS + bytes(control.MAX_MESSAGE),
}
OF_ENGINES = {
    "the end of a front end": b"bad front-0",
    "a speed that is no number": b"speed nan",
    "a speed before time": b"speed -1",
    "a speed in words": b"speed fast",
    "a speed of other bytes": b"speed \xff\xfe",
    "metrics": b"metrics",
}


@pytest.mark.parametrize("name", [*FORGED, *OF_ENGINES])
def test_a_process_that_sends_what_it_never_sends_is_replaced_in_one_line(name, caplog) -> None:
    sender = "engine" if name in OF_ENGINES else "front-1"

    async def scenario() -> Server:
        with ExitStack() as stack:
            server = Server(stack)
            server.ends[sender].send({**FORGED, **OF_ENGINES}[name])
            server.receive(sender)
            server.supervisor._log_failures()
            return server

    server = asyncio.run(scenario())
    assert server.killed == [sender]
    assert [record.message.startswith(f"{sender}: ") for record in caplog.records] == [True]
    assert caplog.records[0].exc_info is None
    assert len(caplog.records[0].message) < 200


def test_processes_that_fail_at_once_are_named_in_one_line(caplog) -> None:
    async def scenario() -> list[str]:
        with ExitStack() as stack:
            server = Server(stack)
            for name in server.processes:
                server.ends[name].send(b"x")
                server.receive(name)
            while not caplog.records:
                await asyncio.sleep(0)
            return server.killed

    assert asyncio.run(scenario()) == ["engine", "front-0", "front-1"]
    (record,) = caplog.records
    assert record.message.startswith("engine, front-0, front-1: the message b'x' is not")


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


FLOODS = {"reports": STATUS + READY, "metrics": b"metrics"}


@pytest.mark.parametrize("name", FLOODS)
def test_a_process_that_sends_too_many_messages_is_replaced(name, monkeypatch) -> None:
    async def scenario() -> int:
        with ExitStack() as stack:
            server, count = Server(stack), 0
            monkeypatch.setattr(server.supervisor, "_send_page", lambda _: asyncio.sleep(0))
            while not server.killed:
                server.ends["front-1"].send(FLOODS[name])
                server.receive("front-1")
                count += 1
            assert server.killed == ["front-1"]
            for _ in range(
                2 * control.MAX_TOKENS
            ):  # who has got as many clients may report them
                assert server.processes["front-0"].send(control.CLIENT)
                control.receive_message(server.ends["front-0"])
                server.ends["front-0"].send(FLOODS["reports"])
                server.receive("front-0")
            assert server.killed == ["front-1"]
            return count

    assert control.MAX_TOKENS < asyncio.run(scenario()) < 2 * control.MAX_TOKENS


def test_an_engine_has_front_ends_connected_at_a_price() -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            server = Server(stack)
            while "engine" not in server.killed:
                server.ends["engine"].send(b"models")
                server.receive("engine")
                for name in ("front-0", "front-1", "engine"):
                    with suppress(ValueError):
                        while (message := control.receive_message(server.ends[name])).kind:
                            for file in message.files:
                                os.close(file)

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


COUNTS = {"the most": 2**63 - 1, "the least": -(2**63), "as many as fit": 256}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_another_process_leave_each_process_its_share_of_the_queue(
    bundle, name
) -> None:
    settings = Settings(queue_size=256)
    registry = registry_of(bundle, FakeRuntime(num_classes=7))
    served = Service(registry, settings)
    cells = memoryview(bytearray(8 * 4)).cast("q")
    served.share_admitted(cells, 1)
    served.num_front_ends = 4
    for position in range(4):  # also that of this process, which only tells others
        cells[position] = COUNTS[name]
    served.check_queue(registry.find(), 64, FOREVER)
    served.admitted = 10
    served.check_queue(registry.find(), 54, FOREVER)
    assert served._count_earlier(registry.find()) <= 40
    if COUNTS[name] > 0:
        with pytest.raises(RejectedError, match="the queue is full"):
            served.check_queue(registry.find(), 55, FOREVER)


NONSENSE = [float("nan"), float("inf"), -float("inf"), 1e300, -1e300]


@pytest.mark.parametrize("tokens", NONSENSE)
@pytest.mark.parametrize("filled", [0.0, *NONSENSE])
def test_a_rate_limit_recovers_from_nonsense_of_another_process(tokens, filled) -> None:
    state = [0.0, 0.0]
    bucket = TokenBucket(1.0, 5, state)
    state[:] = tokens, filled
    bucket.spend(5)
    with pytest.raises(RejectedError, match="retry later") as refused:
        bucket.spend(5)
    assert 1 <= refused.value.reason.retry_after <= 5
    assert bucket.headers()["RateLimit-Remaining"] == "0"


def test_the_keeping_process_receives_from_others_whatever_one_of_them_sends(caplog) -> None:
    names = [
        *WRONG_FILES,
        "no record",
        "a record that is too large",
        "a size behind the end",
        "too large",
    ]

    def send(end: socket.socket, name: str) -> None:
        size = forwarding.SIZE.pack
        contents = {
            "no record": [size(5), b"12345"],
            "a record that is too large": [size(1 << 30), bytes(100)],
            "a size behind the end": [size(1000), b"{}"],
        }
        if name in contents:
            file = create_memory("x", contents[name])
        elif name == "too large":
            file = unsealed(forwarding.MAX_BYTES + 1, CONTENT)
        else:
            file = WRONG_FILES[name]()
        socket.send_fds(end, [b"photo"], [file, file, file])
        os.close(file)

    async def scenario() -> None:
        received: list[bytes] = []
        good, to_good = control.socket_pair()
        forwarding.Receiver(good, lambda image, _: received.append(image), lambda: None)
        for number, name in enumerate(names):
            bad, to_bad = control.socket_pair()
            forwarding.Receiver(bad, lambda image, _: received.append(image), lambda: None)
            with to_bad:
                send(to_bad, name)
                await until(lambda bad=bad: bad.fileno() == -1)
            assert forwarding.forward(to_good, b"%d" % number, record_of())
            await until(lambda number=number: len(received) == number + 1)
        to_good.close()
        await until(lambda: good.fileno() == -1)

    asyncio.run(scenario())
    lines = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ({record.exc_info for record in lines}, len(lines)) == ({None}, len(names))


def test_the_keeping_process_reads_so_many_photographs_of_each_other_one() -> None:
    async def scenario() -> None:
        received, dropped = [], []
        end, sender = control.socket_pair()
        forwarding.Receiver(
            end, lambda image, _: received.append(image), lambda: dropped.append(1)
        )
        with sender:
            while not dropped:
                forwarding.forward(sender, b"x", record_of())
                await asyncio.sleep(0)
        most = forwarding.MAX_TOKENS // forwarding.MIN_TOKENS
        assert most <= len(received) < 2 * most
        await until(lambda: end.fileno() == -1)

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
    **{f"endless {text}": (opening(1, 4096, 4096, 3000 * len(text)) + 3000 * text, lambda: create_memory("x", 8192))
       for text in (b"[],", b"1,", b'"a":1,')},
    "models that end early": (opening(1, 4096, 4096, 100) + b"[", lambda: create_memory("x", 8192)),
    "no JSON": (opening(1, 4096, 4096, 2) + b"[x", lambda: create_memory("x", 8192)),
    "no models": (opening(1, 4096, 4096, 3) + b"[1]", lambda: create_memory("x", 8192)),
    "an empty model": (opening(1, 4096, 4096, 4) + b"[{}]", lambda: create_memory("x", 8192)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPENINGS)
def test_a_front_end_keeps_its_engines_whatever_another_one_sends_first(
    bundle, name, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(channel, "MAX_PARTS", 2000)
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


def result(slot: int, batch_size: int = channel.FAILED) -> bytes:
    return channel.RESULT.pack(slot, batch_size, 0.0, 0.0)


RESULTS: dict[str, bytes] = {
    "a slot without an image": result(0, 1),
    "a slot that does not exist": result(2**32 - 1, 1),
    "a result twice": result(3, 1) * 2,
    "no result": b"\xff" * channel.RESULT.size,
}
OTHER_ERRORS = [{"code": "x", "status": status, "message": "x"} for status in (200, [], "400")]
ERRORS = {
    "an endless error": channel.ERROR_SIZE.pack(2**32 - 1) + b"{}",
    **{
        f"the error {error}": channel.ERROR_SIZE.pack(len(json.dumps(error)))
        + json.dumps(error).encode()
        for error in ({}, [], *OTHER_ERRORS)
    },
}


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


@pytest.mark.parametrize("name", [*RESULTS, *ERRORS])
def test_a_front_end_ends_the_channel_of_an_engine_that_sends_nonsense(
    bundle, name, caplog
) -> None:
    async def scenario() -> None:
        theirs, slots, registry = await connect_engine(bundle)
        waiting = asyncio.ensure_future(registry.find().run(PIXELS[0], FOREVER))
        theirs.setblocking(False)
        await asyncio.get_running_loop().sock_recv(theirs, channel.REQUEST.size)
        if name in ERRORS:
            data = ERRORS[name]
            slots._memory[3, : len(data)] = np.frombuffer(data, np.uint8)
        theirs.sendall(RESULTS.get(name, result(3)))
        with suppress(RejectedError):
            await asyncio.wait_for(waiting, 5)
            assert name == "a result twice"  # the first one was valid
        await until(lambda: registry.problem == "engine_starting")
        with pytest.raises(RejectedError) as refused:
            await registry.find().run(PIXELS[0], FOREVER)
        assert refused.value.reason is RUNTIME_DEAD
        theirs.close()
        await registry.stop()

    asyncio.run(scenario())
    assert [record.exc_info for record in caplog.records] == [None]
    assert caplog.messages[0].startswith("engine engine: ")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_of_an_engine_that_are_not_finite_are_an_error_of_their_image(
    bundle, value
) -> None:
    async def scenario() -> None:
        theirs, slots, registry = await connect_engine(bundle)
        waiting = asyncio.ensure_future(registry.find().run(PIXELS[0], FOREVER))
        theirs.setblocking(False)
        await asyncio.get_running_loop().sock_recv(theirs, channel.REQUEST.size)
        slots.write_outputs(3, {"logits": np.full(7, value, np.float32)}, ["logits"])
        theirs.sendall(result(3, 1))
        with pytest.raises(RejectedError) as refused:
            await asyncio.wait_for(waiting, 5)
        assert (refused.value.reason.code, refused.value.reason.status) == (
            "nonfinite_output",
            500,
        )
        assert registry.problem is None  # other images may be right
        theirs.close()
        await registry.stop()

    asyncio.run(scenario())


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
