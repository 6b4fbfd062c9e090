"""Several processes behind one port, restarted when they die: one for each device, and front ends.

A runtime belongs to one process, so several GPUs need several processes. The process of a
device serves HTTP itself or is the engine of front ends, which serve HTTP. The supervisor
accepts every connection and passes it to the process with the fewest open connections.
Connections wait while all processes have enough of them on the way; if none is there, they get
a 503 response at once. SIGHUP reloads the bundles of every device.

When an engine or a front end starts, the supervisor creates the channels between it and the
others. It trusts no other process (`devices.control`).
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import cast

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from sopdeploy.bundle.sealed import create_memory, map_memory
from sopdeploy.errors import ConfigError
from sopdeploy_service.devices import control
from sopdeploy_service.devices.control import Message, Status
from sopdeploy_service.devices.processes import (
    LaunchConfig,
    Process,
    list_devices,
    list_front_ends,
)
from sopdeploy_service.devices.template import ServerTemplate
from sopdeploy_service.http.api_keys import KeyFile, read_keys
from sopdeploy_service.inference import results
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.observability import logs
from sopdeploy_service.observability.pages import Shared, merge_metrics
from sopdeploy_service.server.lifetime import (
    BEAT_SECONDS,
    USER_ERROR,
    start_task,
    terminal_is_closed,
)
from sopdeploy_service.server.sockets import MAX_PENDING, SPARE, accept_pending, bind, url
from sopdeploy_service.settings import Settings

STABLE_SECONDS = 60.0  # a process that ran this long is restarted without delay
MAX_RESTART_DELAY_SECONDS = 7.0  # with the start, a server is back within 10 s
HANG_SECONDS = 5.0  # a process whose event loop does not run for so long is killed
IDLE_SECONDS = 2.0  # so is one that does not run at all
LEAVE_SECONDS = 30.0  # so is one that has left, or has to, and does not end
LINGER_SECONDS = 1.0  # for a client without a process to read its response

log = logging.getLogger("sopdeploy.supervisor")


def run_supervisor(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* with a process for each device, and front ends, both of *settings*.

    Returns 0 after a drain, 2 if a process cannot start. Raises `ConfigError` for a device or a
    key file that it cannot use, and on other systems than Linux.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError("devices and front_ends: need Linux; remove these settings")
    with logs.configured(settings), bind(settings.host, settings.port) as listener:
        devices = list_devices(settings)
        listener.setblocking(False)
        return asyncio.run(Supervisor(sources, settings, devices, listener).run())


def describe_refusal(root_path: str) -> bytes:
    """Write the response while no process serves HTTP, below *root_path*, as `http.problems` does."""
    reason = results.RUNTIME_DEAD
    title, page = HTTPStatus(reason.status).phrase, f"{root_path}/errors#{reason.code}"
    problem = {"type": page, "title": title, "status": reason.status, "code": reason.code}
    body = json.dumps({**problem, "detail": reason.message}, separators=(",", ":")).encode()
    lines = (
        f"HTTP/1.1 {reason.status} {title}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        f"Retry-After: {reason.retry_after}",
        "Connection: close",
    )
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body


class Refusal(asyncio.Protocol):
    """Sends *response* to a client, whatever it sends."""

    def __init__(self, response: bytes) -> None:
        self._response, self.ended = response, asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the response as the last one."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._response)
        self.transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Note that the client has closed the connection."""
        self.ended.set()


class Supervisor:
    """Runs *devices* and front ends, which serve the bundles at *sources* on *listener*, until a signal."""

    def __init__(
        self,
        sources: Sequence[str | Path],
        settings: Settings,
        devices: Sequence[Process],
        listener: socket.socket,
    ) -> None:
        self._sources = tuple(str(source) for source in sources)
        self._settings, self._devices, self._listener = settings, devices, listener
        self._front_ends = list_front_ends(settings)
        self._stopping = asyncio.Event()
        self._announced = False
        self._code = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._metrics = CollectorRegistry()  # of this process
        ProcessCollector(registry=self._metrics)
        self._metrics_page = Shared(self._collect_metrics)
        self._refusals: set[asyncio.Task[None]] = set()
        self._template, self._starting = ServerTemplate(), asyncio.Lock()

    @property
    def _servers(self) -> Sequence[Process]:
        """The processes that serve HTTP."""
        return self._front_ends or self._devices

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        keys = () if self._settings.keys is None else read_keys(self._settings.keys)
        with ExitStack() as stack:
            num_bytes = control.ADMITTED_BYTES + control.LIMIT_BYTES * len(keys)
            self._shared = create_memory("sopdeploy-shared", num_bytes)
            # The same for every child, whenever it starts: the file may change.
            self._keys = create_memory(
                "sopdeploy-keys", [KeyFile(key=keys).model_dump_json().encode()]
            )
            for file in (self._shared, self._keys):
                stack.callback(os.close, file)
            stack.callback(self._template.close)
            memory = memoryview(map_memory(os.dup(self._shared)))
            self._admitted = memory[: control.ADMITTED_BYTES].cast("q")
            start_task(self._tasks, self._kill_hanging())
            if count := len(self._front_ends):
                log.info(
                    "front ends", extra={"front_ends": count, "engines": len(self._devices)}
                )
            async with asyncio.TaskGroup() as group:
                for process in (*self._devices, *self._front_ends):
                    group.create_task(self._supervise(process))
        return self._code

    def _stop(self) -> None:
        """Let the processes that serve HTTP drain; a second call ends this. Engines end after them."""
        number = signal.SIGINT if self._stopping.is_set() else signal.SIGTERM
        if not self._stopping.is_set():
            start_task(self._tasks, self._end_drain())
        self._stopping.set()
        for process in self._servers:
            if process.child is not None and process.is_running:
                process.child.send_signal(number)
        self._end_unused_engines()

    def _end_unused_engines(self) -> None:
        """End the engines, and the devices that are loading, unless a process still serves HTTP."""
        if any(server.is_running for server in self._servers):
            return
        for process in self._devices:
            self._close_control(process)  # this ends an engine, which ignores SIGTERM
            if not process.is_ready and process.child is not None:
                process.child.send_signal(signal.SIGTERM)

    def _on_hangup(self) -> None:
        """Stop if the terminal was closed; a SIGHUP that a program sends reloads the bundles."""
        if terminal_is_closed():
            self._stop()
            return
        for process in self._devices:
            process.send(control.RELOAD)

    async def _supervise(self, process: Process) -> None:
        """Start *process* whenever it has ended, until the server stops."""
        early_deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            code = None
            try:
                async with self._starting:  # each process knows those before it
                    await self._start(process)
                while process.child is not None and (code := process.child.poll()) is None:
                    await asyncio.sleep(BEAT_SECONDS)
                end = f"exited with code {code}"
            except OSError as error:  # too many processes or files, or too little memory
                end = f"cannot start ({error.strerror or error})"
            self._close_control(process)
            if process in self._servers:  # what it had admitted makes room
                self._admitted[process.position] = 0
            if self._stopping.is_set():
                break
            if code == USER_ERROR and not self._announced:  # another start would fail, too
                self._code = USER_ERROR
                self._stop()
                break
            early_deaths = (
                early_deaths + 1 if time.monotonic() - started < STABLE_SECONDS else 0
            )
            delay = min(
                MAX_RESTART_DELAY_SECONDS, 2 ** max(0, early_deaths - 1) - 1
            )  # 0, 0, 1, 3, 7 ...
            log.error("%s: %s; restart in %.0f s", process.title, end, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
        self._end_unused_engines()

    async def _start(self, process: Process) -> None:
        """Start a child of *process*, or raise `OSError`; connect a front end with the engines."""
        others = [
            other for other in (*self._devices, *self._front_ends) if other is not process
        ]
        ids_of_others = [other.child.pid for other in others if other.child is not None]
        config = LaunchConfig(
            name=process.name,
            device=process.device,
            variables=process.variables,
            sources=self._sources,
            settings=process.settings,
            supervisor=os.getpid(),
            front_ends=len(self._front_ends),
            position=process.position,
            num_servers=len(self._servers),
            others=tuple(ids_of_others),
        )
        ours, theirs = control.socket_pair()
        with theirs, ExitStack() as unless_started:
            unless_started.enter_context(ours)
            files = theirs.fileno(), self._shared, self._keys
            process.child = await self._template.start(config, *files)
            unless_started.pop_all()
        if self._stopping.is_set():  # meanwhile
            process.child.kill()
        process.reset(ours)
        self._loop.add_reader(ours, self._receive, process)
        if process.is_front_end:
            for engine in self._devices:
                if engine.is_ready:
                    self._connect(control.CHANNEL, engine, process)

    def _connect(self, kind: bytes, receiver: Process, sender: Process) -> None:
        """Create a channel of *kind* from *sender* to *receiver*, or let `_supervise` replace the sender."""
        try:
            pair = control.socket_pair() if kind == control.PHOTOS else socket.socketpair()
        except OSError as error:  # too many files
            self._replace(sender, f"has no channel ({error.strerror})")
            return
        for end, process, other in zip(
            pair, (receiver, sender), (sender, receiver), strict=True
        ):
            with end:
                process.send(kind, other.name.encode(), end.fileno())

    def _replace(self, process: Process, reason: str) -> None:
        """Log *reason* and kill the child of *process*, which gets nothing more; `_supervise` goes on."""
        log.error("%s: %s; it is replaced", process.title, reason)
        if process.child is not None:
            process.child.kill()
        self._close_control(process)

    def _close_control(self, process: Process) -> None:
        """Send nothing more to *process*; this ends an engine."""
        if process.control is not None:
            self._loop.remove_reader(process.control)
            process.control.close()
            process.control, process.silent_beats = None, 0
            self._resume_accepting()

    def _receive(self, process: Process) -> None:
        """Handle a message of *process*, which is replaced if it may not send it."""
        if process.control is None:
            return
        try:
            message = control.receive_message(process.control, num_files=0)
            if not message.kind:  # the process drains or has ended
                self._stop_sending(process)
                return
            if message.kind not in self._messages_of(process):
                raise ValueError(f"the message {message.kind[:20]!r} is not for it to send")
            if process.tokens is not None:
                process.tokens.spend(control.COSTS[message.kind])
            self._handle(process, message)
        except ValueError as error:
            self._replace(process, str(error))
        except RejectedError:
            self._replace(process, "it sends too many messages")

    def _messages_of(self, process: Process) -> set[bytes]:
        """Return the kinds of messages that *process* may send."""
        if process in self._servers:
            return {control.STATUS, control.METRICS}
        return {control.STATUS, control.NEW_MODELS, control.BAD_FRONT_END}

    def _handle(self, process: Process, message: Message) -> None:
        """Handle a *message* that *process* may send; raises `ValueError` if its rest is invalid."""
        match message.kind:
            case control.STATUS:
                self._handle_status(process, Status.from_bytes(message.rest))
            case control.METRICS:
                start_task(self._tasks, self._send_page(process))
            case control.NEW_MODELS:
                self._connect_front_ends(process)
            case control.BAD_FRONT_END:
                for front_end in self._front_ends:
                    if front_end.name.encode() == message.rest and front_end.child is not None:
                        # it has sent nonsense; `_supervise` starts another one
                        front_end.child.kill()

    def _connect_front_ends(self, engine: Process) -> None:
        """Create channels between *engine* and all front ends that run."""
        for front_end in self._front_ends:
            if front_end.control is not None:
                self._connect(control.CHANNEL, engine, front_end)

    def _connect_keeper(self, process: Process) -> None:
        """Create channels for photographs, from *process* or to it, if another process keeps them."""
        keeper, *others = self._servers
        for other in others if process is keeper else [process]:
            if self._settings.keep is not None and keeper.is_ready and other.is_ready:
                self._connect(control.PHOTOS, keeper, other)

    def _handle_status(self, process: Process, status: Status) -> None:
        """Record the *status* of *process*; open and print the port once all are ready; resume `_accept`."""
        is_first_report = not process.is_ready
        process.record_status(status)
        if is_first_report:
            log.info("%s: ready", process.title)
            if process in self._servers:
                self._connect_keeper(process)
            else:
                self._connect_front_ends(process)
        expected = (*self._devices, *self._front_ends)
        if not self._announced and all(other.is_ready for other in expected):
            self._announced = True
            self._listener.listen(MAX_PENDING)
            with contextlib.suppress(OSError):  # nobody reads it
                # Each process serves the same bundles.
                sys.stdout.write(f"ready: {url(self._listener)}  {process.bundles}\n")
                sys.stdout.flush()
        self._resume_accepting()

    def _resume_accepting(self) -> None:
        """Let `_accept` look again, which removes this reader while all processes have enough connections."""
        if (
            self._announced and self._listener.fileno() != -1
        ):  # -1: closed at the end of the drain
            self._loop.add_reader(self._listener, self._accept)

    def _stop_sending(self, process: Process) -> None:
        """Send nothing more to *process*; the last one of a drain gets the pending connections first."""
        if process in self._servers:
            is_last = all(
                other.control is None for other in self._servers if other is not process
            )
            if is_last and self._stopping.is_set():
                self._loop.remove_reader(self._listener)
                for connection in accept_pending(self._listener):
                    with connection:
                        process.send(control.CLIENT, b"", connection.fileno())
                self._listener.close()
        self._close_control(process)

    def _accept(self) -> None:
        """Pass a waiting connection to the least loaded process that takes it; refuse it if there is none."""
        serving = [
            process
            for process in self._servers
            if process.is_ready and process.control is not None
        ]
        accepting = [process for process in serving if process.accepts]
        if len(self._refusals) >= SPARE or (
            serving and not accepting
        ):  # pause until there is room again
            self._loop.remove_reader(self._listener)
            return
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # the client has gone
            return
        except (
            OSError
        ):  # no free file: the connection still waits, so pause until the next report
            self._loop.remove_reader(self._listener)
            return
        if not serving:
            start_task(self._refusals, self._refuse(connection))
            return
        with connection:
            # Among processes with as many open connections, in turn: the one with the fewest so
            # far.
            for process in sorted(accepting, key=lambda process: (process.load, process.sent)):
                if process.send(control.CLIENT, b"", connection.fileno()):
                    process.sent += 1
                    return

    async def _refuse(self, connection: socket.socket) -> None:
        """Answer *connection* with 503, and ignore what its client still sends until it closes."""
        refusal = Refusal(describe_refusal(self._settings.root_path))
        await self._loop.connect_accepted_socket(lambda: refusal, connection)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(refusal.ended.wait(), LINGER_SECONDS)
        refusal.transport.abort()
        self._resume_accepting()

    async def _kill_hanging(self) -> None:
        """Kill processes that hang; time in which this process is paused does not count."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            for process in (*self._devices, *self._front_ends):
                is_idle = process.count_silent_beat()  # `Process.record_status` begins again
                has_left = process.control is None
                limit = LEAVE_SECONDS if has_left else IDLE_SECONDS if is_idle else HANG_SECONDS
                if (
                    process.is_ready
                    and process.is_running
                    and process.silent_beats * BEAT_SECONDS > limit
                ):
                    self._replace(process, "does not end" if has_left else "hangs")

    async def _end_drain(self) -> None:
        """Kill the processes that do not end."""
        await asyncio.sleep(self._settings.drain_seconds + LEAVE_SECONDS)
        for process in (*self._devices, *self._front_ends):
            if process.is_running:
                self._replace(process, "does not end")

    async def _send_page(self, process: Process) -> None:
        """Send the metrics of all processes to *process*."""
        # Without a free file or thread, it sends its own metrics.
        with contextlib.suppress(OSError, RuntimeError):
            file = create_memory("sopdeploy-metrics", [await self._metrics_page.get()])
            process.send(control.PAGE, b"", file)
            os.close(file)

    async def _collect_metrics(self) -> bytes:
        """Return a page with the metrics of all processes, which a thread makes."""
        processes = [*self._devices, *self._front_ends]
        # One that loads its models would not answer.
        sockets = [one.control if one.is_ready else None for one in processes]
        replies = await asyncio.gather(*map(control.request_metrics, sockets))
        pages = {one.name: page for one, page in zip(processes, replies, strict=True)}
        return await asyncio.to_thread(
            lambda: merge_metrics(pages, generate_latest(self._metrics))
        )
