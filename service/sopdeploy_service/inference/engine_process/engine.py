"""The engine process: it owns the runtimes of one device and runs the images of all front ends.

Its main thread is an epoll loop that reads slot numbers, puts images into the queues of the models and
returns the outputs; a thread per model runs the batches (`inference.model_worker`). The process uses no event
loop of asyncio, no HTTP and no image library, and gets only pixels from clients.

Front ends decode images of untrusted clients and may be compromised, so the engine validates everything that
they send. It ends the channel of a front end that breaks the protocol and asks the supervisor to replace that
process; other front ends are not affected.
"""

import contextlib
import json
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

from sopdeploy.bundle.class_maps import FEATURES
from sopdeploy_service.inference.engine_process.calls import Calls
from sopdeploy_service.inference.engine_process.channel import (
    READ_BYTES,
    ChannelError,
    Kind,
    Outbox,
    split_records,
)
from sopdeploy_service.inference.engine_process.fronts import (
    CODES,
    IS_COMMAND,
    MAX_COMMAND_BYTES,
    WANTS_FEATURES,
    Front,
    OwnedSlots,
    SlotImage,
    parse_command,
)
from sopdeploy_service.inference.engine_process.models import EngineModel, ModelTable
from sopdeploy_service.inference.engine_process.slots import Reply, Slots
from sopdeploy_service.inference.model_worker import QueuedImage, call_soon
from sopdeploy_service.inference.results import (
    CLIENT_GONE,
    DEADLINE,
    DRAINING,
    ENGINE_FAILED,
    Outcome,
    Rejection,
)

BEAT_SECONDS = 0.1
APPLY_SECONDS = 2.0  # how long a change of models waits for slow front ends
MAX_DEADLINE_SECONDS = 100_000.0
MAX_UNREAD_BYTES = 1 << 16  # of records; a correct front end has at most one reply per slot to read

log = logging.getLogger("sopdeploy.engine")


class Engine:
    """The loop of an engine process; it receives channels of front ends from *broker*."""

    def __init__(self, table: ModelTable, broker: socket.socket, smallest: int = 1) -> None:
        """Serve the models of *table*; front ends get at least *smallest* slots."""
        self._table, self._broker, self._smallest = table, broker, smallest
        self._serving: dict[str, list[EngineModel]] = {}
        self._models: dict[int, EngineModel] = {}  # by number, also those that are being replaced
        self.fronts: dict[int, Front] = {}  # by file descriptor
        self._poll = select.epoll()
        self._calls = Calls()
        self._unsent: set[Front] = set()
        self._changes = 0
        self._waiting: list[tuple[int, float, SlotImage, dict[str, Any]]] = []  # commands to be answered
        self._commands = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._beaten = 0.0
        self._images = self._published = 0  # in slots that the engine owns
        self._running = True
        self.exit_code = 0
        broker.setblocking(False)
        for number in (self._calls.descriptor, broker.fileno()):
            self._poll.register(number, select.EPOLLIN)
        self._adopt_models()

    def run(self) -> int:
        """Serve until the supervisor closes the broker; return the exit code, 70 if a runtime is dead."""
        while self._running:
            for number, _ in self._poll.poll(BEAT_SECONDS):
                if number == self._calls.descriptor:
                    self._calls.reset()
                elif number == self._broker.fileno():
                    self._read_broker()
                elif number in self.fronts:
                    self._read(self.fronts[number])
            self._calls.run()
            for front in tuple(self._unsent):
                self._flush(front)
            self._beat(time.monotonic())
        self._close()
        return self.exit_code

    def call_soon_threadsafe(self, callback: Callable[..., None], /, *values: object) -> None:
        """Run *callback* in the thread of the loop; raises `RuntimeError` after its end, as asyncio does."""
        self._calls.add(partial(callback, *values))

    def stop(self) -> None:
        """End the loop; call it from any thread."""
        self.call_soon_threadsafe(self._end, 0)

    def _end(self, code: int) -> None:
        self._running, self.exit_code = False, code

    def _close(self) -> None:
        for front in tuple(self.fronts.values()):
            self._drop(front)
        self._broker.close()
        self._commands.shutdown(wait=False, cancel_futures=True)
        for model in self._models.values():
            model.queue.close(DRAINING)
            if not self.exit_code:  # otherwise a thread may hang, and the process ends
                model.stop()
        self._poll.close()
        self._calls.close()

    def _beat(self, now: float) -> None:
        """Publish the heartbeat of the loop, detect hung batches, and answer commands that are due."""
        overdue = now - self._beaten >= BEAT_SECONDS / 2
        if overdue or self._images != self._published:
            self._published = self._images
            for front in self.fronts.values():
                front.memories[front.newest].slots.beat(now, self._images)
        if not overdue:
            return
        self._beaten = now
        for model in self._models.values():
            limit = model.hung_seconds()
            if limit is not None:
                log.critical("%s: a batch has been running for more than %.1f s", model.name, limit)
                self._end(70)
        self._answer_commands()
        with contextlib.suppress(OSError):
            self._broker.send(b"beat")

    # Front ends

    def _read_broker(self) -> None:
        """Receive the channel of a front end, or detect that the supervisor has ended."""
        try:
            data, files, _, _ = socket.recv_fds(self._broker, 100, 1)
        except BlockingIOError:
            return
        except OSError:
            data, files = b"", []
        if not data:
            self._end(0)
        elif files:
            self.add_front(socket.socket(fileno=files[0]), data.decode())

    def add_front(self, channel: socket.socket, name: str) -> None:
        """Serve the front end *name* at the other end of *channel*."""
        channel.setblocking(False)
        front = Front(name, channel, Outbox(channel))
        self.fronts[channel.fileno()] = front
        self._poll.register(channel.fileno(), select.EPOLLIN)
        self._announce([front])

    def _read(self, front: Front) -> None:
        """Handle what *front* has sent; end its channel if it violates the protocol."""
        try:
            data = front.channel.recv(READ_BYTES)
            if not data:
                self._drop(front)
                return
            front.pending += data
            for record in split_records(front.pending):
                self._handle(front, *record)
        except BlockingIOError:
            return
        except ConnectionError:
            self._drop(front)
        except Exception as error:  # whatever a front end sends must not end the engine
            expected = isinstance(error, ChannelError)
            log.error("front end %s: %s; it is replaced", front.name, error, exc_info=not expected)
            self._drop(front)
            with contextlib.suppress(OSError):
                self._broker.send(f"replace {front.name}".encode())

    def _drop(self, front: Front) -> None:
        """Forget *front*; its images leave the queues, and its memory is unmapped after running batches."""
        front.closed = True
        self._poll.unregister(front.channel.fileno())
        del self.fronts[front.channel.fileno()]
        self._unsent.discard(front)
        front.outbox.close()
        for memory in front.memories.values():
            self._images -= sum(memory.owned)
            memory.slots.close()
        front.memories.clear()
        self._retire()

    def _flush(self, front: Front) -> None:
        try:
            done = front.outbox.flush()
        except OSError:
            self._drop(front)
            return
        if done:
            self._unsent.discard(front)
        if front.blocked == done:
            front.blocked = not done
            events = select.EPOLLIN | (select.EPOLLOUT if front.blocked else 0)
            self._poll.modify(front.channel.fileno(), events)

    def _send(self, front: Front, kind: Kind, memory: int, slot: int, number: int, file: int | None) -> None:
        front.outbox.add(kind, memory, slot, number, file)
        self._unsent.add(front)

    def _handle(self, front: Front, kind: int, number: int, slot: int, value: int) -> None:
        """Handle one record; raises `ChannelError` for a record that a correct front end never sends."""
        if kind == Kind.SUBMIT:
            self._submit(front, number, slot, value)
        elif kind == Kind.APPLIED:
            front.applied = value
            self._answer_commands()
        elif kind == Kind.RELEASE:
            if value in front.uses:
                front.uses.remove(value)
                front.released.add(value)
            self._retire()
        elif kind == Kind.UNMAPPED:
            memory = front.memories.get(number)
            if memory is None or number == front.newest or any(memory.owned):
                raise ChannelError("cannot give up this memory")
            front.memories.pop(number).slots.close()
        else:
            raise ChannelError(f"unknown record {kind}")

    def _submit(self, front: Front, number: int, slot: int, generation: int) -> None:
        """Take over *slot* of *front* and queue its image; every value is checked."""
        memory = front.memories.get(number)
        if memory is None or slot >= memory.slots.count:
            raise ChannelError(f"no slot {slot} in memory {number}")
        if front.blocked and front.outbox.num_bytes > MAX_UNREAD_BYTES:
            raise ChannelError("reads no replies")
        if memory.owned[slot] or generation == memory.generations[slot]:
            raise ChannelError(f"slot {slot} was sent twice")
        request = memory.slots.read_request(slot)
        if request.generation != generation:
            raise ChannelError(f"slot {slot} has generation {request.generation}, not {generation}")
        now = time.monotonic()
        memory.owned[slot], memory.generations[slot] = 1, generation
        self._images += 1
        item = SlotImage(
            outcome=cast(Any, None),  # `settle` replaces it
            deadline=request.deadline if request.deadline < now + MAX_DEADLINE_SECONDS else now,
            arrived=request.arrived if now - 60 < request.arrived <= now else now,
            features=bool(request.flags & WANTS_FEATURES),
            front=front,
            memory=memory,
            number=number,
            slot=slot,
            generation=generation,
            answer=self._answer,
        )
        if request.flags & IS_COMMAND:
            self._command(item, memory.slots.read_bytes(slot, min(request.length, MAX_COMMAND_BYTES)))
            return
        if request.model in front.released:  # its request ended while a decoder thread was sending it
            item.settle(DRAINING)
            return
        model = self._models.get(request.model)
        if model is None or request.model not in front.uses or model.slot_bytes > memory.slots.size:
            raise ChannelError(f"model {request.model} cannot be used with memory {number}")
        item.image = memory.slots.pixels(slot, model.shape)
        rejection = model.queue.put(item)
        if rejection is not None:
            item.settle(rejection)

    def _answer(self, item: SlotImage, outcome: Outcome) -> None:
        """Write *outcome* to the slot of *item* and send the slot back, unless its front end has ended."""
        slots, slot = item.memory.slots, item.slot
        if item.front.closed:
            return
        if isinstance(outcome, Rejection):
            reply = Reply(CODES[outcome.code])
        else:
            memory, end = slots.floats(slot), 0
            for name, values in outcome.outputs.items():
                if name != FEATURES or item.features:
                    start, end = end, end + values.size
                    memory[start:end] = values.reshape(-1)
            reply = Reply(
                0, 4 * end, outcome.batch, outcome.row, outcome.queue_seconds, outcome.infer_seconds
            )
        self._give_back(item, reply)

    def _give_back(self, item: SlotImage, reply: Reply) -> None:
        item.memory.slots.write_reply(item.slot, reply)
        item.memory.owned[item.slot] = 0
        self._images -= 1
        self._send(item.front, Kind.REPLY, item.number, item.slot, item.generation, None)

    # Models

    def _command(self, item: SlotImage, text: bytes) -> None:
        """Execute a command of a front end (load, unload, roll back) in a thread; reply with JSON."""
        operation, name, folder = parse_command(text)

        def change() -> None:
            try:
                rejection = self._table.change(operation, name, folder)
            except Exception:  # a bug must not leave the client waiting
                log.exception("%s %s failed", operation, name)
                rejection = ENGINE_FAILED
            call_soon(self, self._changed, item, rejection)

        self._commands.submit(change)

    def _changed(self, item: SlotImage, rejection: Rejection | None) -> None:
        """Announce the changed models; answer the command when all front ends use them."""
        if rejection is None:
            self._adopt_models()
            self._announce(list(self.fronts.values()))
        fields = ("code", "status", "message", "retry_after")
        answer = None if rejection is None else {name: getattr(rejection, name) for name in fields}
        self._waiting.append((self._changes, time.monotonic() + APPLY_SECONDS, item, {"rejection": answer}))
        self._answer_commands()

    def _answer_commands(self) -> None:
        now, waiting = time.monotonic(), self._waiting
        self._waiting = []
        for number, until, item, answer in waiting:
            if now < until and any(front.applied < number for front in self.fronts.values()):
                self._waiting.append((number, until, item, answer))
            elif not item.front.closed:
                length = item.memory.slots.write_bytes(item.slot, json.dumps(answer).encode())
                self._give_back(item, Reply(0, length))

    def _adopt_models(self) -> None:
        """Start the models of the table that do not run yet."""
        self._serving = self._table.models()
        for model in self._current():
            if model.number not in self._models:
                self._models[model.number] = model
                model.start(self, partial(self._on_end, model), self._drop_images)
        self._changes += 1

    def _current(self) -> list[EngineModel]:
        return [model for models in self._serving.values() for model in models]

    def _on_end(self, model: EngineModel) -> None:
        if model.queue.closed_with is None:
            log.critical("%s: the model worker has ended", model.name)
            self._end(70)

    def _drop_images(self, items: Sequence[QueuedImage]) -> None:
        """Send back the slots of images whose requests have ended; called by worker threads."""

        def give_back() -> None:
            now = time.monotonic()
            for item in items:
                item.settle(DEADLINE if item.deadline <= now else CLIENT_GONE)

        call_soon(self, give_back)

    def _announce(self, fronts: Sequence[Front]) -> None:
        """Send the models to *fronts*; before that, send larger slots if the largest model needs them."""
        models = self._current()
        size = max((model.slot_bytes for model in models), default=4096)
        smallest = max([self._smallest, *(model.largest_batch for model in models)])
        numbers = {name: [model.number for model in models] for name, models in self._serving.items()}
        state = json.dumps(numbers).encode()
        for front in fronts:
            if front.newest < 0 or front.memories[front.newest].slots.size < size:
                slots = Slots.create(size, smallest)
                slots.beat(time.monotonic(), self._images)
                front.newest += 1
                front.memories[front.newest] = OwnedSlots(slots, bytearray(slots.count), [0] * slots.count)
                self._send(front, Kind.SLOTS, front.newest, 0, 0, os.dup(slots.file))
            for model in models:
                if model.number not in front.uses:
                    front.uses.add(model.number)
                    self._send(front, Kind.BUNDLE, 0, 0, model.number, model.open_archive())
            file = os.memfd_create("sopdeploy-models", os.MFD_CLOEXEC)
            os.write(file, state)
            self._send(front, Kind.MODELS, 0, 0, self._changes, file)
        self._retire()

    def _retire(self) -> None:
        """Stop the models that the table has replaced and no front end uses."""
        kept = {model.number for model in self._current()}
        kept |= {number for front in self.fronts.values() for number in front.uses}
        for number in set(self._models) - kept:
            model = self._models.pop(number)
            for item in model.queue.close(DRAINING):  # their requests have ended, but their slots must return
                item.settle(DRAINING)
            self._commands.submit(model.stop)
