"""The connection of a front end to its engine process: slots, channel and the state of the models.

Slots are taken on the event loop when a request is admitted and given back there. Decoder threads write the
pixels and send the slot's number themselves, so that an image returns to the event loop once.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from sopdeploy_service.inference.engine_process.channel import (
    CARRIES_FILE,
    MAX_FILES,
    READ_BYTES,
    RECORD,
    Kind,
    split_records,
)
from sopdeploy_service.inference.engine_process.fronts import IS_COMMAND, MAX_COMMAND_BYTES
from sopdeploy_service.inference.engine_process.slots import Reply, Request, Slots
from sopdeploy_service.inference.results import ENGINE_DEAD, Rejection

HUNG_SECONDS = 2.0  # without a heartbeat; a busy machine may pause any process for a second
WATCH_SECONDS = 0.05
START_SECONDS = 600.0  # a large model may be loaded for minutes

NO_SLOT = Rejection("slots_full", 503, "the server is full; retry later", 1)
LONG_NAMES = Rejection("cannot_load", 400, "no bundle has such a long name")

log = logging.getLogger("sopdeploy.engine")


class Listener(Protocol):
    """Receives changes of the models and of the health of the engine; `RemoteRegistry` implements it."""

    def set_models(self, numbers: dict[str, list[int]], archives: dict[int, int]) -> None:
        """Serve the models *numbers* by name, current one first; *archives* are the files of new models."""
        ...

    def set_alive(self, *, alive: bool) -> None:
        """Record whether the engine answers."""
        ...

    def forget_models(self) -> None:
        """Forget all numbers: the engine is gone."""
        ...


class Owner(Protocol):
    """Receives the reply in a slot; implemented for images and for commands."""

    def on_reply(self, slot: "Slot", reply: Reply | None, shared: dict[Any, Any]) -> None:
        """Handle *reply*, or None if the engine is dead; all replies of one read have the same *shared*."""
        ...

    def after_read(self, found: Any) -> None:
        """Handle what `on_reply` has stored under this owner in *shared*."""
        ...


@dataclass(eq=False, slots=True)
class SlotPool:
    """The slots in one shared memory: its number, the channel that announced it, and the free slots."""

    number: int
    slots: Slots
    channel: socket.socket
    free: list[int]
    generations: list[int]


@dataclass(eq=False, slots=True)
class Slot:
    """A slot in use. It is *sent* when the engine may own it."""

    pool: SlotPool
    number: int
    generation: int
    owner: Owner | None = None
    item: Any = None  # data of its owner
    sent: bool = False


@dataclass
class EngineClient:
    """Connects a front end to the engine; used on one event loop, apart from `submit`.

    *broker* is a socket of the supervisor, which sends a new channel whenever an engine has started.
    *engines* counts the channels so far.
    """

    broker: socket.socket
    alive: bool = False
    engines: int = 0
    listener: Listener | None = None
    _numbers: dict[str, list[int]] = field(default_factory=dict)
    _pool: SlotPool | None = None
    _pools: dict[int, SlotPool] = field(default_factory=dict)
    _used: dict[tuple[int, int], Slot] = field(default_factory=dict)
    _channel: socket.socket | None = None
    _old: socket.socket | None = None  # the previous channel
    _pending: bytearray = field(default_factory=bytearray)
    _files: list[int] = field(default_factory=list)
    _archives: dict[int, int] = field(default_factory=dict)  # files of new models by number
    _loop: asyncio.AbstractEventLoop | None = None
    _watcher: "asyncio.Task[None] | None" = None

    def connect(self) -> None:
        """Wait for the engine and its models, before an event loop runs.

        Raises `ConnectionError` if the supervisor ends or the engine does not start.
        """
        until = time.monotonic() + START_SECONDS
        while not self.alive:
            waits_on = self.broker if self._channel is None else self._channel
            waits_on.settimeout(max(0.001, until - time.monotonic()))
            try:
                self._read_broker() if self._channel is None else self._read()
            except TimeoutError as error:
                raise ConnectionError("the engine process does not start") from error

    def start(self) -> None:
        """Read messages of the engine, and check its heartbeat, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.broker.setblocking(False)
        self._loop.add_reader(self.broker.fileno(), self._read_broker)
        if self._channel is not None:
            self._channel.setblocking(False)
            self._loop.add_reader(self._channel.fileno(), self._read)
        self._watcher = self._loop.create_task(self._watch())

    def stop(self) -> None:
        """End the connection."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self.broker.fileno())
            if self._channel is not None:
                self._loop.remove_reader(self._channel.fileno())
            self._loop = None
        self.listener = None
        self.alive = False  # so that `lose` neither rejects images nor logs
        self.lose()
        self._close_old()
        self.broker.close()

    @property
    def num_free(self) -> int:
        """The number of slots that can be taken now."""
        return len(self._pool.free) if self._pool is not None else 0

    @property
    def images_elsewhere(self) -> int:
        """The number of images in the engine that other front ends have sent."""
        return 0 if self._pool is None else max(0, self._pool.slots.heartbeat[1] - len(self._used))

    def take(self, count: int) -> list[Slot] | None:
        """Take *count* slots, or none of them if fewer are free."""
        pool = self._pool
        if pool is None or len(pool.free) < count:
            return None
        return [self._use(pool, pool.free.pop()) for _ in range(count)]

    def _use(self, pool: SlotPool, number: int) -> Slot:
        pool.generations[number] = pool.generations[number] % 0xFFFF_FFFF + 1
        return Slot(pool, number, pool.generations[number])

    def give_back(self, slot: Slot) -> None:
        """Free a slot that was not sent, or has its reply."""
        pool = slot.pool
        pool.free.append(slot.number)  # used next, so that a lightly loaded server touches few pages
        if pool is not self._pool and len(pool.free) == pool.slots.count:
            self._unmap(pool)

    def submit(self, slot: Slot, owner: Owner, request: Request) -> bool:
        """Send *slot*, whose reply goes to *owner*; return False if the send fails. Thread-safe."""
        pool = slot.pool
        slot.owner, slot.sent = owner, True
        pool.slots.write_request(slot.number, request)
        self._used[pool.number, slot.number] = slot
        try:
            sent = pool.channel.send(RECORD.pack(Kind.SUBMIT, pool.number, slot.number, slot.generation))
        except OSError:
            sent = 0
        if sent == RECORD.size:
            return True
        self._used.pop((pool.number, slot.number), None)
        slot.sent = False
        return False

    def waiting(self) -> tuple[Slot, ...]:
        """Return the slots that the engine has not given back."""
        return tuple(self._used.values())

    def release_model(self, number: int, engine: int) -> None:
        """Tell the engine that this front end no longer uses the model *number* of that *engine*."""
        if engine == self.engines:
            self._send(Kind.RELEASE, number)

    def listen(self, listener: Listener) -> None:
        """Report the current models, and from now on every change, to *listener*."""
        self.listener = listener
        self._report_models()

    def _report_models(self) -> None:
        if self.listener is not None:
            archives, self._archives = self._archives, {}
            self.listener.set_models(self._numbers, archives)

    async def command(self, operation: str, name: str, folder: str | None = None) -> Rejection | None:
        """Load, unload or roll back the model *name*; every front end uses the result when this returns."""
        text = json.dumps({"operation": operation, "name": name, "folder": folder}).encode()
        if len(text) > MAX_COMMAND_BYTES:
            return LONG_NAMES
        slots = self.take(1) if self.alive else None
        if slots is None:
            return NO_SLOT if self.alive else ENGINE_DEAD
        command = _Command()
        length = slots[0].pool.slots.write_bytes(slots[0].number, text)
        now = time.monotonic()
        if not self.submit(slots[0], command, Request(0, IS_COMMAND, length, now, now, slots[0].generation)):
            self.give_back(slots[0])
            return ENGINE_DEAD
        return await command.result

    def lose(self) -> None:
        """Forget the engine, and reject all requests that wait for its reply."""
        channel, self._channel = self._channel, None
        if channel is None:
            return
        if self._loop is not None:
            self._loop.remove_reader(channel.fileno())
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)
        self._close_old()
        self._old = channel  # closed later: a decoder thread may be sending
        for file in (*self._files, *self._archives.values()):
            os.close(file)
        self._files.clear()
        self._pending.clear()
        self._archives.clear()
        self._set_alive(alive=False)
        if self.listener is not None:
            self.listener.forget_models()
        self._used.clear()
        for pool in self._pools.values():
            pool.slots.close()
        self._pools.clear()
        self._pool = None

    def _close_old(self) -> None:
        if self._old is not None:
            self._old.close()
            self._old = None

    def _set_alive(self, *, alive: bool) -> None:
        """Record whether the engine answers; if it does not, reject all images that wait for it."""
        if alive == self.alive:
            return
        self.alive = alive
        level = logging.INFO if alive else logging.ERROR
        log.log(level, "the engine process %s", "runs" if alive else "does not answer")
        if self.listener is not None:
            self.listener.set_alive(alive=alive)
        if not alive:
            shared: dict[Any, Any] = {}
            for slot in self.waiting():
                slot.pool.slots.cancel(slot.number)
                if slot.owner is not None:
                    slot.owner.on_reply(slot, None, shared)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._pool is not None:
                moment, _ = self._pool.slots.heartbeat
                self._set_alive(alive=time.monotonic() - moment < HUNG_SECONDS)

    def _read_broker(self) -> None:
        """Receive a channel to a new engine, or detect that the supervisor has ended."""
        try:
            data, files, _, _ = socket.recv_fds(self.broker, 100, 1)
        except BlockingIOError:
            return
        if not data:
            if self._loop is not None:
                self._loop.remove_reader(self.broker.fileno())
                return
            raise ConnectionError("the supervisor has ended")
        if files:
            self.lose()
            self.engines += 1
            self._channel = socket.socket(fileno=files[0])
            self._channel.setblocking(self._loop is None)
            if self._loop is not None:
                self._loop.add_reader(self._channel.fileno(), self._read)

    def _read(self) -> None:
        """Handle the records that have arrived; the stream ends when the engine dies."""
        channel = self._channel
        if channel is None:
            return
        try:
            data, files, _, _ = socket.recv_fds(channel, READ_BYTES, MAX_FILES)
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionError:
            data, files = b"", []
        self._files += files
        if not data:
            self.lose()
            return
        self._pending += data
        self._handle_records()

    def _handle_records(self) -> None:
        shared: dict[Any, Any] = {}
        for kind, memory, slot, number in split_records(self._pending):
            file = self._files.pop(0) if kind in CARRIES_FILE else -1
            if kind == Kind.REPLY:
                self._on_reply(memory, slot, number, shared)
            elif kind == Kind.SLOTS:
                self._on_slots(memory, file)
            elif kind == Kind.BUNDLE:
                self._archives[number] = file
            elif kind == Kind.MODELS:
                with os.fdopen(file, "rb") as state:
                    state.seek(0)
                    self._numbers = json.load(state)
                self._report_models()
                self._send(Kind.APPLIED, number)
                self._set_alive(alive=True)
        for owner, found in shared.items():
            owner.after_read(found)

    def _on_reply(self, memory: int, number: int, generation: int, shared: dict[Any, Any]) -> None:
        slot = self._used.get((memory, number))
        if slot is None or slot.generation != generation:
            return
        del self._used[memory, number]
        reply = slot.pool.slots.read_reply(number)
        if slot.owner is not None:
            slot.owner.on_reply(slot, reply, shared)
        self.give_back(slot)

    def _on_slots(self, number: int, file: int) -> None:
        """Use new slots from now on; unmap the old slots when all of them are free."""
        if self._channel is None:
            return
        before, slots = self._pool, Slots.open(file)
        free = list(range(slots.count - 1, -1, -1))
        self._pool = SlotPool(number, slots, self._channel, free, [0] * slots.count)
        self._pools[number] = self._pool
        if before is not None and len(before.free) == before.slots.count:
            self._unmap(before)

    def _unmap(self, pool: SlotPool) -> None:
        if self._pools.get(pool.number) is pool:
            del self._pools[pool.number]
            pool.slots.close()
            self._send(Kind.UNMAPPED, 0, pool.number)

    def _send(self, kind: Kind, number: int, memory: int = 0) -> None:
        if self._channel is not None:
            try:
                self._channel.send(RECORD.pack(kind, memory, 0, number))
            except OSError:  # the end of the stream follows
                log.debug("the engine process does not read")


class _Command:
    """Owner of the slot of a command; the reply is JSON in this slot."""

    def __init__(self) -> None:
        self.result: asyncio.Future[Rejection | None] = asyncio.get_running_loop().create_future()

    def on_reply(self, slot: Slot, reply: Reply | None, shared: dict[Any, Any]) -> None:  # noqa: ARG002
        if self.result.done():
            return
        if reply is None:
            self.result.set_result(ENGINE_DEAD)
            return
        found = json.loads(slot.pool.slots.read_bytes(slot.number, reply.length))["rejection"]
        self.result.set_result(None if found is None else Rejection(**found))

    def after_read(self, found: Any) -> None:
        """Do nothing: `on_reply` has stored the only reply of a command."""
