"""The server process of one device; its connections come from the supervisor, which starts this module."""

import asyncio
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import generate_latest

from sopdeploy.environment import exit_process
from sopdeploy.errors import SopdeployError
from sopdeploy_service.devices import control
from sopdeploy_service.devices.processes import CONFIG_VARIABLE, LaunchConfig
from sopdeploy_service.inference.decoders import decode_budget, upload_budget
from sopdeploy_service.inference.service import Service
from sopdeploy_service.runtime.device_memory import resident_bytes
from sopdeploy_service.server.draining_server import DrainingServer
from sopdeploy_service.server.lifetime import USER_ERROR, start_task
from sopdeploy_service.server.process import configured_process, find_links, load_app
from sopdeploy_service.settings import Settings


class DeviceServer(DrainingServer):
    """A server whose connections come from the *supervisor*."""

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        supervisor: socket.socket,
        sources: Sequence[str | Path],
        links: Mapping[Path, Path],
    ) -> None:
        super().__init__(app, settings, sources, links)
        self._supervisor = supervisor
        self._received = 0  # connections
        self._supervisor_left = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def on_open(self, sockets: Sequence[socket.socket]) -> None:  # noqa: ARG002
        """Listen to the supervisor, which passes on connections after the first report."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._supervisor, self._receive)

    def _report(self) -> None:
        num_open = len(self.server_state.connections) + len(self._tasks)  # those being accepted
        status = control.STATUS.pack(self._received, num_open)
        control.send_files(self._supervisor, status + self.bundles.encode())

    def _receive(self) -> None:
        """Act on a message of the supervisor; an empty one says that it has ended or sends no more.

        The file of `SEND_METRICS` is a socket for the metrics, that of `CLIENT` an accepted connection.
        """
        message, files = control.receive_files(self._supervisor)
        if not message:
            self._loop.remove_reader(self._supervisor)
            self._supervisor_left.set()
        if message == control.RELOAD:
            self.reload()
        for file in files:
            if message == control.SEND_METRICS:
                page = generate_latest(self._service.metrics.registry)
                start_task(self._tasks, control.send_metrics(file, page))
            else:  # `CLIENT`
                self._received += 1
                start_task(self._tasks, self.serve_connections([socket.socket(fileno=file)]))
        self._report()

    async def on_tick(self, counter: int) -> bool:
        """Also report to the supervisor, which shows that the event loop runs."""
        ends = await super().on_tick(counter)
        if not ends:
            self._report()
        return ends

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Get no more connections, and serve those that are on their way."""
        self._supervisor.shutdown(socket.SHUT_WR)
        await self._supervisor_left.wait()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await super().shutdown(sockets)


def main() -> int:
    """Serve as the supervisor says in the environment until SIGTERM or a dead runtime; return the exit code.

    This process sends itself SIGTERM when the supervisor ends. It may use its share of the memory that the
    whole server has for uploads and decoding. An error is printed as one line.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a server reloads on it when it is ready
    config = LaunchConfig.model_validate_json(os.environ.pop(CONFIG_VARIABLE))

    def stop_with_supervisor() -> None:
        os.read(config.lifeline, 1)  # returns when the supervisor closes the pipe, or dies
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_supervisor, name="lifeline", daemon=True).start()
    try:
        settings = config.settings
        supervisor = socket.socket(fileno=config.control)
        with configured_process(settings):
            limits = memoryview(mmap.mmap(config.buckets, 0)).cast("d")  # float64, shared by all processes
            # Read before the bundles: a link that moves while they are loaded then counts as moved.
            links = find_links(config.sources, settings)
            app = load_app(config.sources, settings, limits=limits)
            service: Service = app.state.service
            service.metrics_of_all = partial(control.request_metrics, supervisor)
            server = DeviceServer(app, settings, supervisor, config.sources, links)
            service.max_upload_bytes = upload_budget(settings, config.num_processes)
            # The supervisor, and processes that have loaded the same models as this one.
            at_rest = resident_bytes(os.getppid()) + config.num_processes * resident_bytes()
            service.decoders.budget = decode_budget(settings, at_rest, config.num_processes)
            return server.serve_until_end()
    except SopdeployError as problem:
        sys.stderr.write(f"error: device {config.name}: {problem} [{problem.code}]\n")
        return USER_ERROR


if __name__ == "__main__":
    exit_process(main())
