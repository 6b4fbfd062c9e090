"""`serve --devices 0,1`: one process per device behind one port, restarted when it dies.

A runtime belongs to one process, so several GPUs need several processes. The supervisor accepts every
connection and passes it to the process with the fewest open connections. While no process accepts
connections, they wait. SIGHUP reloads the bundles in every process.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from sopdeploy_service.devices import control
from sopdeploy_service.devices.processes import CONFIG_VARIABLE, LaunchConfig, Process, list_processes
from sopdeploy_service.observability import logs
from sopdeploy_service.server.lifetime import BEAT_SECONDS, STDERR, USER_ERROR, start_task, terminal_is_closed
from sopdeploy_service.server.sockets import MAX_PENDING, accept_pending, bind, url
from sopdeploy_service.settings import Settings

MODULE = "sopdeploy_service.devices.device_server"
STABLE_SECONDS = 60.0  # a process that ran this long is restarted without delay
MAX_RESTART_DELAY_SECONDS = 30.0
HANG_SECONDS = 5.0  # a process whose event loop does not run for so long is killed

log = logging.getLogger("sopdeploy.supervisor")


def run_supervisor(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* with a process for each of the devices of *settings*.

    Returns 0 after a drain, 2 if a process cannot start; raises `ConfigError` for a device it cannot use.
    """
    with logs.configured(settings), bind(settings.host, settings.port) as listener:
        processes = list_processes(settings)
        listener.setblocking(False)
        return asyncio.run(Supervisor(sources, processes, listener).run())


class Supervisor:
    """Runs *processes*, which serve the bundles at *sources* on *listener*, until a signal arrives."""

    def __init__(
        self, sources: Sequence[str | Path], processes: Sequence[Process], listener: socket.socket
    ) -> None:
        self._sources = tuple(str(source) for source in sources)
        self._processes = processes
        self._listener = listener
        self._stopping = asyncio.Event()
        self._announced = False
        self._code = 0
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
            self._buckets = os.memfd_create("sopdeploy-limits", os.MFD_CLOEXEC)
            os.ftruncate(self._buckets, control.LIMIT_BYTES)
            for file in (self._lifeline, writing, self._buckets):
                stack.callback(os.close, file)
            start_task(self._tasks, self._kill_hanging())
            await asyncio.gather(*(self._supervise(process) for process in self._processes))
        return self._code

    def _stop(self) -> None:
        """Let the processes drain."""
        self._stopping.set()
        for process in self._processes:
            if process.child is not None and process.child.poll() is None:
                process.child.send_signal(signal.SIGTERM)

    def _on_hangup(self) -> None:
        """Stop if the terminal was closed; a SIGHUP that a program sends reloads the bundles."""
        if terminal_is_closed():
            self._stop()
            return
        for process in self._processes:
            process.send(control.RELOAD)

    async def _supervise(self, process: Process) -> None:
        """Start *process* whenever it has ended, until the server stops."""
        early_deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            process.child = self._start(process)
            code = await self._loop.run_in_executor(self._waiters, process.child.wait)
            self._close_control(process)
            if self._stopping.is_set():
                return
            if code == USER_ERROR and not self._announced:  # another start would fail, too
                self._code = USER_ERROR
                self._stop()
                return
            early_deaths = early_deaths + 1 if time.monotonic() - started < STABLE_SECONDS else 0
            delay = min(MAX_RESTART_DELAY_SECONDS, 2 ** max(0, early_deaths - 1) - 1)  # 0, 0, 1, 3, 7 ...
            log.error("device %s: exited with code %d; restart in %.0f s", process.name, code, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    def _start(self, process: Process) -> subprocess.Popen[str]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        with theirs:
            config = LaunchConfig(
                name=process.name,
                sources=self._sources,
                settings=process.settings,
                lifeline=self._lifeline,
                control=theirs.fileno(),
                buckets=self._buckets,
                num_processes=len(self._processes),
            )
            variables = {**process.variables, CONFIG_VARIABLE: config.model_dump_json()}
            child = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                text=True,
                stdout=STDERR,  # stdout has the `ready` line only
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which forwards it
                pass_fds=(config.lifeline, config.control, config.buckets),
                env={**os.environ, **variables},
            )
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
        """Handle a message of *process*: its status, or a request for metrics."""
        if process.control is None:
            return
        message, files = control.receive_files(process.control)
        if files:  # sockets for the metrics
            for file in files:
                start_task(self._tasks, self._send_metrics(file))
            return
        if not message:  # the process drains or has ended
            self._stop_sending(process)
            return
        is_first_report = process.bundles is None
        process.report(message)  # sets `bundles`
        if is_first_report:
            log.info("device %s: ready", process.name)
        if not self._announced and all(other.bundles is not None for other in self._processes):
            self._announce(process)  # the last process has become ready
        # `_accept` removes this reader while no process accepts; now *process* may accept again.
        if self._announced and self._listener.fileno() != -1:  # -1: closed at the end of the drain
            self._loop.add_reader(self._listener, self._accept)

    def _stop_sending(self, process: Process) -> None:
        """Send nothing more to *process*; the last one of a drain gets the pending connections first."""
        is_last = all(other.control is None for other in self._processes if other is not process)
        if is_last and self._stopping.is_set():
            self._loop.remove_reader(self._listener)
            for connection in accept_pending(self._listener):
                with connection:
                    process.send(control.CLIENT, connection.fileno())
            self._listener.close()
        self._close_control(process)

    def _announce(self, process: Process) -> None:
        """Open the port, and print that the server is ready, with the bundles of any *process*."""
        self._announced = True
        self._listener.listen(MAX_PENDING)
        with contextlib.suppress(OSError):  # nobody reads it
            sys.stdout.write(f"ready: {url(self._listener)}  {process.bundles}\n")
            sys.stdout.flush()

    def _accept(self) -> None:
        """Pass a waiting connection to the least loaded process that takes it; close it if none does."""
        accepting = [process for process in self._processes if process.accepts]
        if not accepting:  # pause until a process reports that it has received more
            self._loop.remove_reader(self._listener)
            return
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the client has gone
            return
        with connection:
            # Among processes with as many open connections, in turn: the one with the fewest so far.
            for process in sorted(accepting, key=lambda one: (one.load, one.sent)):
                if process.send(control.CLIENT, connection.fileno()):
                    process.sent += 1
                    return

    async def _kill_hanging(self) -> None:
        """Kill processes that hang; time in which this process is paused does not count."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            for process in self._processes:
                process.silent_beats += 1  # `Process.report` sets it to 0
                is_silent = process.silent_beats * BEAT_SECONDS > HANG_SECONDS
                # It need not report while it loads (`bundles` is None) or drains (`control` is None).
                must_report = process.bundles is not None and process.control is not None
                if is_silent and must_report and process.child is not None:
                    log.error("device %s: hangs; it is killed", process.name)
                    process.child.kill()
                    self._close_control(process)

    async def _send_metrics(self, file: int) -> None:
        """Send the metrics of all processes to the socket *file*."""
        controls = [process.control for process in self._processes]
        pages = await asyncio.gather(*map(control.request_metrics, controls))
        names = [process.name for process in self._processes]
        ids = {process.name: process.child.pid for process in self._processes if process.child is not None}
        ids["supervisor"] = os.getpid()
        page = control.merge_metrics(dict(zip(names, pages, strict=True)), ids)
        await control.send_metrics(file, page)
