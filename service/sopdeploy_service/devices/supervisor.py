"""Several processes behind one port, restarted when they die: one for each device, and front ends.

A runtime belongs to one process, so several GPUs need several processes. The process of a device serves HTTP
itself or, if its models are faster than one process can decode and answer, is the engine of front ends, which
serve HTTP. The supervisor accepts every connection and passes it to the process with the fewest open
connections. While no process accepts connections, they wait. SIGHUP reloads the bundles of every device.

When an engine or a front end starts, the supervisor creates the channels between it and the others.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from sopdeploy.errors import ConfigError
from sopdeploy_service.devices import control
from sopdeploy_service.devices.processes import (
    CONFIG_VARIABLE,
    LaunchConfig,
    Process,
    choose_front_ends,
    list_devices,
    list_front_ends,
)
from sopdeploy_service.http.api_keys import KeyFile, read_keys
from sopdeploy_service.observability import logs
from sopdeploy_service.observability.pages import Shared, merge_metrics
from sopdeploy_service.server.lifetime import BEAT_SECONDS, STDERR, USER_ERROR, start_task, terminal_is_closed
from sopdeploy_service.server.sockets import MAX_PENDING, accept_pending, bind, url
from sopdeploy_service.settings import Settings

MODULE = "sopdeploy_service.devices.device_server"
STABLE_SECONDS = 60.0  # a process that ran this long is restarted without delay
MAX_RESTART_DELAY_SECONDS = 30.0
HANG_SECONDS = 5.0  # a process whose event loop does not run for so long is killed

log = logging.getLogger("sopdeploy.supervisor")


def run_supervisor(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* with a process for each of the devices of *settings*, and front ends.

    Returns 0 after a drain, 2 if a process cannot start. Raises `ConfigError` for a device or a key file that
    it cannot use, and on other systems than Linux.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError("devices and front_ends: need Linux; remove these settings")
    with logs.configured(settings), bind(settings.host, settings.port) as listener:
        devices = list_devices(settings)
        listener.setblocking(False)
        return asyncio.run(Supervisor(sources, settings, devices, listener).run())


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
        self._front_ends: list[Process] = []
        # The number of front ends, known as soon as all devices have told their speed if it depends on this.
        self._num_front_ends = None if settings.front_ends == "auto" else settings.front_ends
        self._seconds: dict[Process, float] = {}  # that a device needs for an image
        self._stopping = asyncio.Event()
        self._announced = self._must_reload = False
        self._code = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._metrics = CollectorRegistry()  # of this process
        ProcessCollector(registry=self._metrics)
        self._metrics_page = Shared(self._collect_metrics)

    @property
    def _servers(self) -> Sequence[Process]:
        """The processes that serve HTTP."""
        return self._front_ends or (self._devices if self._num_front_ends == 0 else ())

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        keys = () if self._settings.keys is None else read_keys(self._settings.keys)
        with ExitStack() as stack:
            self._lifeline, writing = os.pipe()  # closed when this process ends, however it ends
            self._shared = os.memfd_create("sopdeploy-shared", os.MFD_CLOEXEC)
            os.ftruncate(self._shared, control.ADMITTED_BYTES + control.LIMIT_BYTES * len(keys))
            # The same for every child, whenever it starts: the file may change.
            self._keys = os.memfd_create("sopdeploy-keys", os.MFD_CLOEXEC)
            os.write(self._keys, KeyFile(key=keys).model_dump_json().encode())
            for file in (self._lifeline, writing, self._shared, self._keys):
                stack.callback(os.close, file)
            # The process that keeps photographs reads from the first end, all others write to the second one.
            self._photos_in, self._photos_out = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
            )
            stack.enter_context(self._photos_in)
            stack.enter_context(self._photos_out)
            memory = memoryview(mmap.mmap(self._shared, 0))
            self._admitted = memory[: control.ADMITTED_BYTES].cast("q")
            start_task(self._tasks, self._kill_hanging())
            async with asyncio.TaskGroup() as self._group:
                for process in self._devices:
                    self._group.create_task(self._supervise(process))
                if self._num_front_ends:
                    self._start_front_ends(self._num_front_ends)
        return self._code

    def _stop(self) -> None:
        """Let the processes that serve HTTP drain; a second call ends this. Engines end after them."""
        number = signal.SIGINT if self._stopping.is_set() else signal.SIGTERM
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
                process.child.terminate()

    def _on_hangup(self) -> None:
        """Stop if the terminal was closed; a SIGHUP that a program sends reloads the bundles."""
        if terminal_is_closed():
            self._stop()
            return
        self._must_reload = self._num_front_ends is None
        for process in self._devices:
            process.send(control.RELOAD)

    async def _supervise(self, process: Process) -> None:
        """Start *process* whenever it has ended, until the server stops."""
        early_deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            code = None
            try:
                self._start(process)
                while process.child is not None and (code := process.child.poll()) is None:
                    await asyncio.sleep(BEAT_SECONDS)
                end = f"exited with code {code}"
            except OSError as error:  # too many processes or files, or too little memory
                end = f"cannot start ({error.strerror})"
            self._close_control(process)
            if process in self._servers:  # what it had admitted makes room
                self._admitted[process.position] = 0
            if self._stopping.is_set():
                break
            if code == USER_ERROR and not self._announced:  # another start would fail, too
                self._code = USER_ERROR
                self._stop()
                break
            early_deaths = early_deaths + 1 if time.monotonic() - started < STABLE_SECONDS else 0
            delay = min(MAX_RESTART_DELAY_SECONDS, 2 ** max(0, early_deaths - 1) - 1)  # 0, 0, 1, 3, 7 ...
            log.error("%s: %s; restart in %.0f s", process.title, end, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
        self._end_unused_engines()

    def _start(self, process: Process) -> None:
        """Start a child of *process*, or raise `OSError`; connect a front end with the engines."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        others = [other for other in (*self._devices, *self._front_ends) if other is not process]
        ids_of_others = [other.child.pid for other in others if other.child is not None]
        with theirs, ExitStack() as unless_started:
            unless_started.enter_context(ours)
            config = LaunchConfig(
                name=process.name,
                device=process.device,
                sources=self._sources,
                settings=process.settings,
                lifeline=self._lifeline,
                control=theirs.fileno(),
                shared=self._shared,
                keys=self._keys,
                photos=(self._photos_in if process.position == 0 else self._photos_out).fileno(),
                front_ends=self._num_front_ends,
                position=process.position,
                num_servers=self._num_front_ends or len(self._devices),
                others=tuple(ids_of_others),
            )
            variables = {**process.variables, CONFIG_VARIABLE: config.model_dump_json()}
            process.child = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                text=True,
                stdout=STDERR,  # stdout has the `ready` line only
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which forwards it
                pass_fds=(config.lifeline, config.control, config.shared, config.keys, config.photos),
                env={**os.environ, **variables},
            )
            unless_started.pop_all()
        process.reset(ours)
        self._loop.add_reader(ours, self._receive, process)
        if process.is_front_end:
            for engine in self._devices:
                if engine.is_ready:
                    self._connect(engine, process)

    def _connect(self, engine: Process, front_end: Process) -> None:
        """Create a channel between *engine* and *front_end*, or let `_supervise` replace the front end."""
        try:
            for_engine, for_front_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:  # too many files
            log.error("%s: has no channel (%s); it is killed", front_end.title, error.strerror)
            if front_end.child is not None:
                front_end.child.kill()
            return
        with for_engine, for_front_end:
            engine.send(control.CHANNEL + front_end.name.encode(), for_engine.fileno())
            front_end.send(control.CHANNEL + engine.name.encode(), for_front_end.fileno())

    def _decide_front_ends(self, seconds_per_image: float) -> None:
        """Tell all devices, which wait for it, how many front ends there will be, and start these."""
        count = self._num_front_ends = choose_front_ends(self._settings, seconds_per_image)
        for device in self._devices:
            device.send(control.FRONT_ENDS + str(count).encode())
            if self._must_reload:  # the device has ignored this message while it waited
                device.send(control.RELOAD)
        if count:
            self._start_front_ends(count)

    def _start_front_ends(self, count: int) -> None:
        """Start *count* front ends, each of which is restarted when it ends."""
        self._front_ends = list_front_ends(self._settings, count)
        log.info("front ends", extra={"front_ends": count, "engines": len(self._devices)})
        for process in self._front_ends:
            self._group.create_task(self._supervise(process))

    def _close_control(self, process: Process) -> None:
        """Send nothing more to *process*; this ends an engine."""
        if process.control is not None:
            self._loop.remove_reader(process.control)
            process.control.close()
            process.control = None

    def _receive(self, process: Process) -> None:
        """Handle a message of *process*: its status, a request for metrics, or news of a device."""
        if process.control is None:
            return
        message, files = control.receive_message(process.control)
        if message == control.SEND_METRICS:  # without its socket if this process can open no more files
            for file in files:
                start_task(self._tasks, self._send_metrics(file))
        elif not message:  # the process drains or has ended
            self._stop_sending(process)
        elif message.startswith(control.SPEED):
            self._seconds[process] = float(message.removeprefix(control.SPEED))
            if self._num_front_ends is None and len(self._seconds) == len(self._devices):
                self._decide_front_ends(max(self._seconds.values()))
        elif message == control.NEW_MODELS:
            self._connect_front_ends(process)
        elif message.startswith(control.BAD_FRONT_END):
            name = message.removeprefix(control.BAD_FRONT_END).decode()
            children = {front_end.name: front_end.child for front_end in self._front_ends}
            if (bad := children.get(name)) is not None:
                bad.kill()  # it has sent nonsense; `_supervise` starts another one
        else:
            self._handle_status(process, message)

    def _connect_front_ends(self, engine: Process) -> None:
        """Create channels between *engine* and all front ends that run."""
        for front_end in self._front_ends:
            if front_end.control is not None:
                self._connect(engine, front_end)

    def _handle_status(self, process: Process, status: bytes) -> None:
        """Record the *status* of *process*; open and print the port once all are ready; resume `_accept`."""
        is_first_report = not process.is_ready
        process.record_status(status)
        if is_first_report:
            log.info("%s: ready", process.title)
            if not process.is_front_end:
                self._connect_front_ends(process)
        expected = (*self._devices, *self._front_ends)
        if not self._announced and self._servers and all(other.is_ready for other in expected):
            self._announced = True
            self._listener.listen(MAX_PENDING)
            with contextlib.suppress(OSError):  # nobody reads it
                # Each process serves the same bundles.
                sys.stdout.write(f"ready: {url(self._listener)}  {process.bundles}\n")
                sys.stdout.flush()
        # `_accept` removes this reader while no process accepts; now *process* may accept again.
        if self._announced and self._listener.fileno() != -1:  # -1: closed at the end of the drain
            self._loop.add_reader(self._listener, self._accept)

    def _stop_sending(self, process: Process) -> None:
        """Send nothing more to *process*; the last one of a drain gets the pending connections first."""
        if process in self._servers:
            is_last = all(other.control is None for other in self._servers if other is not process)
            if is_last and self._stopping.is_set():
                self._loop.remove_reader(self._listener)
                for connection in accept_pending(self._listener):
                    with connection:
                        process.send(control.CLIENT, connection.fileno())
                self._listener.close()
        self._close_control(process)

    def _accept(self) -> None:
        """Pass a waiting connection to the least loaded process that takes it; close it if none does."""
        accepting = [process for process in self._servers if process.accepts]
        if not accepting:  # pause until a process reports that it has received more
            self._loop.remove_reader(self._listener)
            return
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # the client has gone
            return
        except OSError:  # no free file: the connection still waits, so pause until the next report
            self._loop.remove_reader(self._listener)
            return
        with connection:
            # Among processes with as many open connections, in turn: the one with the fewest so far.
            for process in sorted(accepting, key=lambda process: (process.load, process.sent)):
                if process.send(control.CLIENT, connection.fileno()):
                    process.sent += 1
                    return

    async def _kill_hanging(self) -> None:
        """Kill processes that hang; time in which this process is paused does not count."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            for process in (*self._devices, *self._front_ends):
                process.silent_beats += 1  # `Process.record_status` sets it to 0
                is_silent = process.silent_beats * BEAT_SECONDS > HANG_SECONDS
                must_report = process.is_ready and process.control is not None  # None: it drains
                if is_silent and must_report and process.child is not None:
                    log.error("%s: hangs; it is killed", process.title)
                    process.child.kill()
                    self._close_control(process)

    async def _send_metrics(self, file: int) -> None:
        """Send the metrics of all processes to the socket *file*."""
        with ExitStack() as unless_merged:
            unless_merged.callback(os.close, file)
            page = await self._metrics_page.get()
            unless_merged.pop_all()
        await control.send_metrics(file, page)

    async def _collect_metrics(self) -> bytes:
        """Return a page with the metrics of all processes, which a thread makes."""
        processes = [*self._devices, *self._front_ends]
        # One that loads its models would not answer.
        sockets = [process.control if process.is_ready else None for process in processes]
        replies = await asyncio.gather(
            *(control.request_metrics(one, control.METRICS_SECONDS) for one in sockets)
        )
        pages = {process.name: page for process, page in zip(processes, replies, strict=True)}
        return await asyncio.to_thread(lambda: merge_metrics(pages, generate_latest(self._metrics)))
