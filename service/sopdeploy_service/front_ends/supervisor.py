"""`serve --devices 0,1 --front-ends 4`: processes behind one port, restarted when they die.

A runtime belongs to one process, so several GPUs need several processes: one per device, or an inference
process and several front ends per device. The supervisor accepts every connection and passes it to the
process with the fewest open connections. While no process accepts connections, they wait.

A front end and its inference process share a channel. When an inference process dies, its front ends answer
503 until they get a channel to the next one. SIGHUP reloads the bundles in every process that has models.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sopdeploy_service.front_ends import control
from sopdeploy_service.front_ends.processes import (
    INFERENCE,
    MODULES,
    SERVER,
    Process,
    count_front_ends,
    list_processes,
)
from sopdeploy_service.inference.bundle_store import links_among, moves_of
from sopdeploy_service.kept_folder import KeptFolder
from sopdeploy_service.observability import logs
from sopdeploy_service.server.launch import (
    BEAT_SECONDS,
    STDERR,
    USER_ERROR,
    start_process,
    start_task,
    terminal_is_closed,
)
from sopdeploy_service.server.sockets import MAX_PENDING, accept_pending, bind, url
from sopdeploy_service.settings import Settings

if TYPE_CHECKING:  # a server of one process starts without these modules
    pass

STABLE_SECONDS = 60.0  # a process that ran this long is restarted without delay
MAX_RESTART_DELAY_SECONDS = 30.0
HANG_SECONDS = 5.0  # a process whose event loop does not run for so long is killed
MAX_KEEPING = 4  # photographs that are received and written at once

log = logging.getLogger("sopdeploy.supervisor")


def run_supervisor(sources: Sequence[str | Path], settings: Settings) -> int | None:
    """Serve the bundles at *sources* with several processes; return None if *settings* need only one.

    The exit code is 0 after a drain, 2 if a process cannot start at all. Raises `ConfigError` for a device
    that this process cannot use, for too many front ends, and for a folder `keep` that cannot be used.
    """
    if not settings.devices and count_front_ends(settings) == 1:
        return None
    with logs.configured(settings), bind(settings.host, settings.port) as listener:
        processes = list_processes(settings)
        listener.setblocking(False)
        return asyncio.run(Supervisor(sources, settings, processes, listener).run())


class Supervisor:
    """Runs *processes*, which serve the bundles at *sources* on *listener*, until a signal arrives."""

    def __init__(
        self,
        sources: Sequence[str | Path],
        settings: Settings,
        processes: Sequence[Process],
        listener: socket.socket,
    ) -> None:
        self._sources = [str(source) for source in sources]
        self._links = links_among(sources) if settings.follow else None
        self._settings = settings
        self._processes = processes
        self._servers = [process for process in processes if process.kind == SERVER]
        self._listener = listener
        self._kept = None
        if settings.keep is not None:
            self._kept = KeptFolder(settings.keep, settings.keep_bytes, settings.keep_days)
        self._keeping = 0  # photographs
        self._stopping = asyncio.Event()
        self._announced = False
        self._code = 0
        self._output_error: OSError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code."""
        self._loop = asyncio.get_running_loop()
        self._waiters = ThreadPoolExecutor(len(self._processes))  # one for each child
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        with ExitStack() as stack:
            self._lifeline, writing = os.pipe()  # closed when this process ends, however it ends
            self._buckets = control.create_memory()
            for file in (self._lifeline, writing, self._buckets):
                stack.callback(os.close, file)
            self._writer = stack.enter_context(ThreadPoolExecutor(1, "keeper"))
            start_task(self._tasks, self._kill_hanging())
            if self._links is not None:
                start_task(self._tasks, self._follow(self._links))
            supervised = {
                process: start_task(self._tasks, self._supervise(process)) for process in self._processes
            }
            await asyncio.gather(*(supervised[process] for process in self._servers))
            for process in set(self._processes) - set(self._servers):
                self._close_control(process)  # it ends
                if process.child is not None and process.bundles is None:  # it loads models
                    process.child.kill()
            await asyncio.gather(*supervised.values())
        if self._output_error is not None:
            raise self._output_error
        return self._code

    def _stop(self) -> None:
        """Let the servers drain; inference processes end after them."""
        self._stopping.set()
        for process in self._servers:
            if process.child is not None and process.child.poll() is None:
                process.child.send_signal(signal.SIGTERM)

    def _on_hangup(self) -> None:
        """Stop if the terminal was closed; a SIGHUP that a program sends reloads the bundles."""
        if terminal_is_closed():
            self._stop()
        else:
            self._reload()

    def _reload(self) -> None:
        """Let every process that has models reload its bundles."""
        for process in self._processes:
            if process.inference is None:
                process.send(control.RELOAD)

    async def _follow(self, links: Mapping[Path, Path]) -> None:
        async for _ in moves_of(links):
            self._reload()

    async def _supervise(self, process: Process) -> None:
        """Start *process* whenever it has ended, until the server stops."""
        early_deaths = 0
        while not self._stopping.is_set():
            if process.inference is not None and process.inference.control is None:
                await asyncio.sleep(BEAT_SECONDS)
                continue
            started = time.monotonic()
            process.child = self._start(process)
            code = await self._loop.run_in_executor(self._waiters, process.child.wait)
            self._close_control(process)
            if self._stopping.is_set():
                return
            if code == USER_ERROR and not self._announced:
                self._code = USER_ERROR
                self._stop()
                return
            early_deaths = early_deaths + 1 if time.monotonic() - started < STABLE_SECONDS else 0
            delay = min(MAX_RESTART_DELAY_SECONDS, 2.0 ** max(0, early_deaths - 1) - 1)
            log.error("%s: exited with code %d; restart in %.0f s", process, code, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    def _start(self, process: Process) -> subprocess.Popen[str]:
        ours, theirs = control.pair()
        files = [self._lifeline, theirs.fileno()]
        config: dict[str, Any] = {
            "sources": self._sources,
            "settings": {
                **self._settings.model_dump(mode="json"),
                **process.settings,
                "follow": False,
                "devices": (),
            },
            "name": process.name,
            "lifeline": self._lifeline,
            "control": theirs.fileno(),
        }
        with ExitStack() as stack:
            stack.enter_context(theirs)
            if process in self._servers:
                config["buckets"] = self._buckets
                config["servers"] = len(self._servers)
                others = [other.child for other in self._processes if other not in self._servers]
                config["inference"] = [child.pid for child in others if child is not None]
                files.append(self._buckets)
            if process.inference is not None:
                channel = stack.enter_context(_connect(process.inference, process.name))
                config["channel"] = channel.fileno()
                files.append(channel.fileno())
            # stdout has the `ready` line only
            child = start_process(MODULES[process.kind], config, files, process.variables, stdout=STDERR)
        process.reset(ours)
        self._loop.add_reader(ours, self._receive, process)
        return child

    def _close_control(self, process: Process) -> None:
        """Send nothing more to *process*, which then ends."""
        if process.control is not None:
            self._loop.remove_reader(process.control)
            process.control.close()
            process.control = None

    def _receive(self, process: Process) -> None:
        """Handle a message of *process*: status, news for front ends, a photograph, a request for metrics.

        An invalid message ends the connection, because a front end is not trusted.
        """
        if process.control is None:
            return
        message, files = control.receive_files(process.control)
        if files:
            for file in files:
                start_task(
                    self._tasks, self._keep(file) if message == control.KEEP else self._send_metrics(file)
                )
            return
        if process.kind == INFERENCE and message.startswith(control.NEWS):
            self._tell_front_ends(process, message)
            return
        is_new = process.bundles is None
        try:
            process.report(message)
        except struct.error:  # invalid, or empty because the process drains or has ended
            self._stop_sending(process)
            return
        if is_new:
            log.info("%s: ready", process)
        if not self._announced and all(other.bundles is not None for other in self._processes):
            self._announce(process.bundles or "")
        if self._announced and self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _tell_front_ends(self, inference: Process, message: bytes) -> None:
        """Let the front ends of *inference* use its new models or know why it cannot start, or kill one."""
        kind, _, text = message.partition(b": ")
        for front_end in self._servers:
            if front_end.inference is not inference or front_end.bundles is None:
                continue
            if kind == control.NEW_MODELS:
                with _connect(inference, front_end.name) as channel:
                    front_end.send(control.CHANNEL, channel.fileno())
            elif kind == control.FAILED:
                front_end.send(message)
            elif front_end.name == text.decode() and front_end.child is not None:
                front_end.child.kill()

    def _stop_sending(self, process: Process) -> None:
        """Send nothing more to *process*; the last one that drains gets the pending connections."""
        others = [other for other in self._servers if other is not process and other.control is not None]
        if self._stopping.is_set() and not others and process in self._servers:
            self._loop.remove_reader(self._listener)
            for connection in accept_pending(self._listener):
                with connection:
                    process.send(control.CLIENT, connection.fileno())
            self._listener.close()
        self._close_control(process)

    def _announce(self, bundles: str) -> None:
        """Open the port, and print that the server is ready."""
        self._announced = True
        self._listener.listen(MAX_PENDING)
        try:
            sys.stdout.write(f"ready: {url(self._listener)}  {bundles}\n")
            sys.stdout.flush()
        except OSError as problem:  # raised by `run`
            self._output_error = problem
            self._stop()

    def _accept(self) -> None:
        """Pass a waiting connection to the process with the fewest open connections."""
        accepting = [process for process in self._servers if process.accepts]
        if not accepting:  # until one of them reports again
            self._loop.remove_reader(self._listener)
            return
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the client has gone
            return
        with connection:
            for process in sorted(accepting, key=lambda process: (process.load, process.sent)):
                process.sent += 1
                if process.send(control.CLIENT, connection.fileno()):
                    return

    async def _kill_hanging(self) -> None:
        """Kill processes that hang; time in which this process is paused does not count."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            for process in self._processes:
                process.silent_beats += 1
                silent = process.silent_beats * BEAT_SECONDS > HANG_SECONDS
                if silent and process.bundles is not None and process.control is not None and process.child:
                    log.error("%s: hangs; it is killed", process)
                    process.child.kill()
                    self._close_control(process)

    async def _keep(self, file: int) -> None:
        """Write a photograph from the socket *file*; a front end that sends anything else gets no result."""
        with socket.socket(fileno=file) as connection:
            if self._kept is None or self._keeping == MAX_KEEPING:
                return
            connection.setblocking(False)
            self._keeping += 1
            try:
                async with asyncio.timeout(control.KEEP_SECONDS):
                    photo = await control.receive_kept(connection)
                    result = await self._loop.run_in_executor(self._writer, self._kept.add, *photo)
                    await self._loop.sock_sendall(connection, result.encode())
            except (OSError, ValueError, struct.error) as error:
                log.warning("a process sent no photograph that can be kept: %s", type(error).__name__)
            finally:
                self._keeping -= 1

    async def _collect_metrics(self) -> bytes:
        pages = await asyncio.gather(*(control.request_metrics(process.control) for process in self._servers))
        names = [process.name for process in self._servers]
        ids = {process.name: process.child.pid for process in self._processes if process.child is not None}
        ids["supervisor"] = os.getpid()
        return control.merge_metrics(dict(zip(names, pages, strict=True)), ids)

    async def _send_metrics(self, file: int) -> None:
        await control.send_metrics(file, await self._collect_metrics())


def _connect(inference: Process, name: str) -> socket.socket:
    """Connect the front end *name*, which is about to start, to *inference*; return its channel.

    If the inference process has just died, the channel is at its end.
    """
    ours, theirs = socket.socketpair()
    with ours:
        inference.send(name.encode(), ours.fileno())
    return theirs
