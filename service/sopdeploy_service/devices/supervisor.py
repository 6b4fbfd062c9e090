"""Several processes behind one port, restarted when they die: one for each device, and front ends.

A runtime belongs to one process, so several GPUs need several processes. The process of a
device serves HTTP itself or is the device process of front ends, which serve HTTP. The supervisor
accepts every connection and passes it to the process with the fewest open connections.
Connections wait while all processes have enough of them on the way; if none is there, they get
a 503 response at once. SIGHUP reloads the bundles of every device, and the API keys.

When a device process or a front end starts, the supervisor creates the channels between it and the
others.

One rule keeps the server alive: each process reports every tenth of a second. One that does not
report, or cannot receive new keys, is replaced by another fork.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from sopdeploy.bundle.sealed import create_memory, map_memory
from sopdeploy.errors import ConfigError, RuntimeUnavailableError, SopdeployError
from sopdeploy_service.devices import control
from sopdeploy_service.devices.channels import Channels
from sopdeploy_service.devices.control import Status
from sopdeploy_service.devices.processes import (
    LEAVE_SECONDS,
    NOT_STARTED,
    LaunchConfig,
    Process,
    list_devices,
    list_front_ends,
)
from sopdeploy_service.devices.refusal import Refusal, refusal_response
from sopdeploy_service.devices.shared_keys import SharedKeys
from sopdeploy_service.devices.template import ServerTemplate
from sopdeploy_service.http.api_keys import keys_of_server, read_again
from sopdeploy_service.inference.load_time import load_seconds
from sopdeploy_service.observability import logs
from sopdeploy_service.observability.pages import Shared, keys_gauge, merge_metrics
from sopdeploy_service.server.lifetime import (
    BEAT_SECONDS,
    EXIT_RUNTIME_DEAD,
    USER_ERROR,
    Joined,
    follow_keys,
    lacks_room,
    room_required,
    terminal_is_closed,
)
from sopdeploy_service.server.sockets import SPARE, Arrivals, announce, bind, raise_file_limit
from sopdeploy_service.server.tls import TLS_LIMITS, tls_context
from sopdeploy_service.settings import Settings
from sopdeploy_service.tasks import start_task

STABLE_SECONDS = 60.0  # a process that ran this long is restarted without delay
MAX_RESTART_DELAY_SECONDS = 7.0  # with the start, a server is back within 10 s
MAX_FAILED_STARTS = (
    8  # of a device, one after another; with the delays, 40 s and the time of the starts
)
HANGS_AT_START = f"{NOT_STARTED}; check the device and the disk"
NO_KEYS = "it cannot receive the API keys"
LINGER_SECONDS = 1.0  # for a client without a process to read its response

log = logging.getLogger("sopdeploy.supervisor")


def run_supervisor(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* with a process for each device, and front ends, both of *settings*.

    Returns 0 after a drain, 2 if a process has printed a user error before the server was ready, and
    70 if no device can be started again.
    Raises `RuntimeUnavailableError` if a process does not start before the server was ready, or
    if the system has no room for the server. Raises `ConfigError` for a GPU that
    CUDA_VISIBLE_DEVICES does not list, for a key file or a port that it cannot use, and on other
    systems than Linux.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError("devices and front_ends: need Linux; remove these settings")

    with (
        room_required(),
        logs.configured(settings),
        bind(settings.host, settings.port) as listener,
    ):
        raise_file_limit(0)
        devices = list_devices(settings)
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
        self._settings = settings
        self._devices = devices
        self._listener = listener
        self._tls_context = tls_context(settings)
        self._arrivals = Arrivals(listener, self._pass_on)
        self._front_ends = list_front_ends(settings)

        self._stopping = asyncio.Event()
        self._announced = False
        self._error: SopdeployError | None = None  # which ends the command
        self._code = 0
        self._gave_up = False  # waiting for processes that do not end when they are killed

        self._failures: dict[str, list[str]] = {}  # not logged yet, with titles of processes
        self._key_reloads = Joined(self._reload_keys, tries_again=settings.follow)
        self._channels = Channels(self._devices, self._front_ends)
        self._tasks: set[asyncio.Task[None]] = set()

        self._metrics = CollectorRegistry()  # of this process
        ProcessCollector(registry=self._metrics)
        self._keys_unreadable = keys_gauge(self._metrics)
        self._metrics_page = Shared(self._collect_metrics)

        self._refusals: set[asyncio.Task[None]] = set()
        self._template = ServerTemplate()
        self._starting = asyncio.Lock()

    @property
    def _servers(self) -> Sequence[Process]:
        """The processes that serve HTTP."""
        return self._front_ends or self._devices

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code, or raise as `run_supervisor` does."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

        keys = () if self._settings.keys is None else keys_of_server(self._settings.keys)
        with ExitStack() as stack:
            # Memory that all processes share: how many images each has admitted.
            self._shared = create_memory("sopdeploy-shared", control.ADMITTED_BYTES)
            stack.callback(os.close, self._shared)
            self._admitted = memoryview(map_memory(os.dup(self._shared))).cast("q")

            # The keys are the same for every child, whenever it starts: the file may change. A
            # reload replaces them.
            self._keys = SharedKeys(keys)
            stack.callback(lambda: self._keys.close())
            stack.callback(self._template.close)

            # Replace processes that cannot work, send what they lack, and reload on changes.
            start_task(self._tasks, self._replace_failing())
            start_task(self._tasks, self._channels.send_again())
            follow_keys(self._tasks, self._settings, self._key_reloads.request)

            if count := len(self._front_ends):
                log.info(
                    "front ends", extra={"front_ends": count, "engines": len(self._devices)}
                )

            # Run the processes until the server stops.
            async with asyncio.TaskGroup() as group:
                for process in (*self._devices, *self._front_ends):
                    group.create_task(self._supervise(process))

        self._log_failures()
        if self._error is not None:
            raise self._error
        return self._code

    def _stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Let the processes that serve HTTP end as after the signal *number*; a second call ends their drain.

        Device processes end after them.
        """
        is_first_call = not self._stopping.is_set()
        if is_first_call:
            self._stopping.set()
            start_task(self._tasks, self._limit_drain())
        self._template.abort()  # no other process starts

        # One that is not ready has no requests to complete.
        number = number if is_first_call else signal.SIGINT
        for process in self._servers:
            if process.child is not None:
                process.child.send_signal(number if process.is_ready else signal.SIGKILL)
        self._end_unused_devices()

    def _end_unused_devices(self) -> None:
        """End the device processes, also those that are loading, unless a process that serves HTTP still runs."""
        if any(server.is_running for server in self._servers):
            return

        for process in self._devices:
            self._close_control(process)  # this ends a device process, which ignores SIGTERM
            if not process.is_ready and process.child is not None:
                process.child.kill()

    def _on_hangup(self) -> None:
        """Stop if the terminal was closed; a SIGHUP that a program sends reloads bundles and keys."""
        if terminal_is_closed():
            self._stop()
        else:
            self._reload()

    def _reload(self) -> None:
        """Let devices reload their bundles, and the processes that serve HTTP get the keys of the file."""
        for process in self._devices:
            process.send(control.RELOAD)
        self._key_reloads.request()

    async def _reload_keys(self) -> bool:
        """Send the keys of the file to the processes that serve HTTP, if they have changed.

        Returns whether they have the keys that are in the file now.
        """
        keys = await read_again(self._settings, self._keys_unreadable)
        if keys is None:
            return False
        if keys == self._keys.ring.keys:
            return True

        try:
            new = SharedKeys(keys, self._keys.ring)
        except OSError as error:
            self._keys_unreadable.set(1)
            log.error("keys not reloaded, those in use stay: %s", error.strerror)
            return False

        # A process that is starting gets them when it has started.
        self._keys.close()
        self._keys = new
        for process in self._servers:
            self._send_keys(process)
        log.info("keys reloaded", extra={"keys": len(keys)})
        return True

    def _send_keys(self, process: Process) -> None:
        """Send the keys to *process*, which is replaced if it cannot receive them."""
        is_sent = process.send(control.KEYS, b"", *self._keys.files)
        if process.control is not None and not is_sent:
            self._replace(process, NO_KEYS)

    async def _supervise(self, process: Process) -> None:
        """Start *process* whenever it has ended, until the server stops.

        A user error in it, such as a bundle that is missing, ends a server that was never ready. So does
        a device that cannot come back, if no other device works: a server that answers every image
        with 503 would run for ever.
        """
        early_deaths = 0
        failed_starts = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            end, code = await self._run_child(process)
            if process.is_ready:
                failed_starts = 0
            elif (
                code is not None
            ):  # without a code it was not started, because there was no room
                failed_starts += 1

            # Its channels, and what it had admitted, have ended with it.
            self._close_control(process)
            if process in self._servers:
                self._admitted[process.position] = 0

            if self._stopping.is_set():
                break
            if code == USER_ERROR and not self._announced:  # another start would fail, too
                self._code = USER_ERROR
                self._stop()
                break

            if failed_starts >= MAX_FAILED_STARTS and self._is_last_device(process):
                self._report(
                    process, f"{end}; {failed_starts} starts failed, so the server ends"
                )
                self._code = EXIT_RUNTIME_DEAD
                self._stop()
                break

            # After each end soon after a start, the next start comes later: after 0, 1, 3, 7, 7 s,
            # and so on.
            is_early = time.monotonic() - started < STABLE_SECONDS
            early_deaths = early_deaths + 1 if is_early else 0
            delay = min(MAX_RESTART_DELAY_SECONDS, 2 ** max(0, early_deaths - 1) - 1)
            self._report(process, f"{end}; restart in {delay:.0f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

        self._end_unused_devices()

    def _is_last_device(self, process: Process) -> bool:
        """Tell whether *process* is a device and no other device is ready."""
        others = (device for device in self._devices if device is not process)
        return process in self._devices and not any(other.is_ready for other in others)

    async def _run_child(self, process: Process) -> tuple[str, int | None]:
        """Start a child of *process*, and wait until it has ended; return how, and its exit code.

        The code is None if it did not start, or cannot even be killed. If it did not start and the
        server has never been ready, the server ends.
        """
        code: int | None = None
        try:
            # One after another: each gets the ids of those before it.
            async with self._starting:
                await self._start(process)

            while process.child is not None and (code := process.child.poll()) is None:
                if self._gave_up:
                    self._report(process, "does not end")
                    break
                await asyncio.sleep(BEAT_SECONDS)
        except TimeoutError:  # of the template
            self._fail_start(process, HANGS_AT_START)
            return NOT_STARTED, None
        except (OSError, RuntimeError) as error:  # the template has ended, or there is no room
            is_bug = not isinstance(error, OSError) and not lacks_room(error)
            if is_bug:
                raise
            problem = f"cannot start ({getattr(error, 'strerror', None) or error})"
            advice = "allow more processes and files, or choose fewer"
            self._fail_start(process, f"{problem}; {advice}")
            return problem, None

        return f"exited with code {code}", code

    def _describe(self, process: Process) -> LaunchConfig:
        """Describe *process* for the template, which forks it."""
        # A front end gets the process ids of the device processes that run.
        devices = self._devices if process.device is None else []
        running = [device.child for device in devices if device.child is not None]

        return LaunchConfig(
            name=process.name,
            device=process.device,
            variables=process.variables,
            sources=self._sources,
            settings=process.settings,
            supervisor=os.getpid(),
            front_ends=len(self._front_ends),
            position=process.position,
            num_servers=len(self._servers),
            device_processes=tuple(child.pid for child in running),
        )

    async def _start(self, process: Process) -> None:
        """Start a child of *process*, or raise `OSError`; connect a front end with the device processes."""
        config = self._describe(process)

        # Start it, with its socket. One that serves HTTP also gets the keys, and what it shares.
        ours, theirs = control.socket_pair()
        with theirs, ExitStack() as sent, ExitStack() as unless_started:
            unless_started.enter_context(ours)
            files = [theirs.fileno()]
            keys = self._keys
            if process in self._servers:
                # A reload closes the files of the keys, also while the template is asked.
                key_files = [os.dup(file) for file in keys.files]
                for file in key_files:
                    sent.callback(os.close, file)
                files += [self._shared, *key_files]
            process.child = await self._template.start(config, *files)
            unless_started.pop_all()

        if self._stopping.is_set():  # meanwhile
            process.child.kill()

        # Listen to it, and connect a front end with the device processes that are ready.
        process.reset(ours)
        self._loop.add_reader(ours, self._receive, process)
        if process in self._servers and self._keys is not keys:  # reloaded meanwhile
            self._send_keys(process)

        if process.is_front_end:
            self._channels.connect_devices(process)

    def _replace(self, process: Process, reason: str) -> None:
        """Log *reason* and kill the child of *process*, which gets nothing more; `_supervise` starts another."""
        self._report(process, f"{reason}; it is replaced")
        if process.child is not None:
            process.child.kill()

        self._close_control(process)
        process.silent_beats = 0  # also if it was closed: it has time to end

    def _report(self, process: Process, failure: str) -> None:
        """Log the *failure* of *process*, in one line with those that have the same within a beat."""
        if not self._failures:
            asyncio.get_running_loop().call_later(BEAT_SECONDS, self._log_failures)
        titles = self._failures.setdefault(failure, [])
        if process.title not in titles:  # its next start may have failed, too
            titles.append(process.title)

    def _log_failures(self) -> None:
        """Log the failures that were reported, each with its processes."""
        for failure, titles in self._failures.items():
            log.error("%s: %s", ", ".join(titles), failure)
        self._failures.clear()

    def _close_control(self, process: Process) -> None:
        """Send nothing more to *process*; this ends a device process."""
        if process.control is not None:
            self._loop.remove_reader(process.control)
            process.control.close()
            process.control = None

            process.silent_beats = 0
            self._pass_on()

    def _receive(self, process: Process) -> None:
        """Handle a message of *process*, which is replaced if the message is too long."""
        if process.control is None:
            return
        try:
            message = control.receive_message(process.control, num_files=0)
        except ValueError as error:
            self._replace(process, str(error))
            return

        match message.kind:
            case b"":  # the process drains or has ended
                self._stop_sending(process)
            case control.STATUS:
                self._handle_status(process, Status.from_bytes(message.rest))
            case control.METRICS:
                start_task(self._tasks, self._send_page(process))
            case control.NEW_MODELS:
                self._channels.connect_front_ends(process)

    def _handle_status(self, process: Process, status: Status) -> None:
        """Record the *status* of *process*; if all are ready, open the port and print its URL.

        A device process that has become ready gets channels to the front ends. A process that could
        not receive the keys is replaced, because the earlier ones would stay in use.
        """
        if not status.has_keys:
            self._replace(process, NO_KEYS)
            return

        was_ready = process.is_ready
        process.record_status(status)

        if process.is_ready and not was_ready:
            log.info("%s: ready", process.title)
            if process not in self._servers:
                self._channels.connect_front_ends(process)

        # Open the port when all processes are ready.
        expected = (*self._devices, *self._front_ends)
        if not self._announced and all(other.is_ready for other in expected):
            self._announced = True
            self._arrivals.open()

            with contextlib.suppress(OSError):  # nobody reads it
                # Each process serves the same bundles.
                bundles = str(process.bundles)
                count = len(self._front_ends)
                announce(self._listener, self._settings.scheme, bundles, count)

        self._pass_on()  # the process may take more connections now

    def _stop_sending(self, process: Process) -> None:
        """Send nothing more to *process*; the last one of a drain gets the pending connections first."""
        if process in self._servers:
            is_last = all(
                other.control is None for other in self._servers if other is not process
            )

            if is_last and self._stopping.is_set():
                for connection in self._arrivals.close():
                    with connection:
                        process.send(control.CLIENT, b"", connection.fileno())

        self._close_control(process)

    def _pass_on(self) -> None:
        """Pass connections that wait to the least loaded process that takes them, or refuse them without any."""
        while self._arrivals:
            serving = [
                process
                for process in self._servers
                if process.is_ready and process.control is not None
            ]

            # One that does not work answers fast, with 503; without any other, clients get that.
            working = [process for process in serving if process.works]
            accepting = [process for process in working or serving if process.accepts]

            # They wait until there is room again: for another refusal, or in a process.
            if len(self._refusals) >= SPARE or (serving and not accepting):
                return

            connection = self._arrivals.take()
            if not serving:
                start_task(self._refusals, self._refuse(connection))
                continue

            # First the process with the fewest open connections; of several, the one that has
            # got the fewest so far. If none can be sent it, it is closed.
            with connection:
                for process in sorted(
                    accepting, key=lambda process: (process.load, process.sent)
                ):
                    if process.send(control.CLIENT, b"", connection.fileno()):
                        process.sent += 1
                        break

    async def _refuse(self, connection: socket.socket) -> None:
        """Answer *connection* with 503, and ignore what its client still sends until it closes."""
        refusal = Refusal(refusal_response(self._settings.root_path))
        context = self._tls_context
        tls: dict[str, Any] = {} if context is None else {"ssl": context, **TLS_LIMITS}
        with contextlib.suppress(OSError):  # its handshake fails, or it does not close in time
            await self._loop.connect_accepted_socket(lambda: refusal, connection, **tls)
            await asyncio.wait_for(refusal.ended.wait(), LINGER_SECONDS)

        if refusal.transport is not None:
            refusal.transport.abort()
        self._pass_on()

    async def _replace_failing(self) -> None:
        """Replace each process that cannot work.

        Beats are counted, not seconds, so that time in which this process is paused has no effect.
        """
        seconds = load_seconds(self._settings)
        while True:
            await asyncio.sleep(BEAT_SECONDS)

            if self._stopping.is_set():
                self._template.abort()  # also one that has just been started

            for process in (*self._devices, *self._front_ends):
                if not process.is_running:
                    continue

                reason = process.count_beat(seconds)
                if reason == NOT_STARTED:
                    self._fail_start(process, HANGS_AT_START)
                if reason:
                    self._replace(process, reason)

    def _fail_start(self, process: Process, problem: str) -> None:
        """End the server with the *problem* of *process* if the server has never been ready."""
        if not self._announced and not self._stopping.is_set():
            self._error = RuntimeUnavailableError(f"{process.title}: it {problem}")
            self._stop()

    async def _limit_drain(self) -> None:
        """Kill the processes that outlast the time of their end by `LEAVE_SECONDS`.

        The server does not wait for those that cannot be killed.
        """
        settings = self._settings
        await asyncio.sleep(settings.lame_duck_seconds + settings.drain_seconds + LEAVE_SECONDS)
        for process in (*self._devices, *self._front_ends):
            if process.is_running:
                self._replace(process, "does not end")

        await asyncio.sleep(LINGER_SECONDS)
        self._gave_up = True

    async def _send_page(self, process: Process) -> None:
        """Send the metrics of all processes to *process*."""
        # Without a free file or thread, *process* gets no page, and shows its own metrics.
        with contextlib.suppress(OSError, RuntimeError):
            file = create_memory("sopdeploy-metrics", [await self._metrics_page.get()])
            process.send(control.PAGE, b"", file)
            os.close(file)

    async def _collect_metrics(self) -> bytes:
        """Return a page with the metrics of all processes, which a thread makes."""
        # Without a socket, the page is empty: a process that loads its models would not answer.
        processes = [*self._devices, *self._front_ends]
        sockets = [process.control if process.is_ready else None for process in processes]
        replies = await asyncio.gather(*map(control.request_metrics, sockets))

        names = [process.name for process in processes]
        pages = dict(zip(names, replies, strict=True))
        return await asyncio.to_thread(
            lambda: merge_metrics(pages, generate_latest(self._metrics))
        )
