"""A process that serves HTTP behind a port it shares with others: that of a device, or a front end.

The supervisor starts this module. A front end has a channel to an inference process and enters the sandbox;
the process of a device runs the models itself.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI
from prometheus_client import generate_latest

from sopdeploy_service.app import create_app
from sopdeploy_service.decoding import sandbox
from sopdeploy_service.front_ends import control
from sopdeploy_service.front_ends.remote import RemoteRegistry, attach
from sopdeploy_service.inference.decoders import decode_budget, upload_budget
from sopdeploy_service.inference.service import Service
from sopdeploy_service.runtime.device_memory import resident_bytes
from sopdeploy_service.server.draining_server import DrainingServer
from sopdeploy_service.server.launch import run_program, start_task
from sopdeploy_service.server.process import configured_process, load_app
from sopdeploy_service.settings import Settings

log = logging.getLogger("sopdeploy.server")


class FrontServer(DrainingServer):
    """A server whose connections come from the *supervisor*; one without *sources* is a front end."""

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        supervisor: socket.socket,
        sources: Sequence[str],
    ) -> None:
        super().__init__(app, settings, sources)
        self._is_front_end, self._is_stuck = not sources, False
        self._supervisor = supervisor
        self._received = 0  # connections
        self._supervisor_left = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def on_open(self, sockets: Sequence[socket.socket]) -> None:  # noqa: ARG002
        """Listen to the supervisor, which passes on connections after the first report."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._supervisor, self._receive)

    def _report(self) -> None:
        num_open = len(self.server_state.connections) + len(self._tasks)
        status = control.STATUS.pack(self._received, num_open)
        control.send_files(self._supervisor, status + self.bundles.encode())

    def _receive(self) -> None:
        """Act on a message of the supervisor; without a message it has ended.

        Some come with files: `CHANNEL` with a socket to the inference process, `SEND_METRICS` with a file to
        write them to, `CLIENT` with an accepted connection.
        """
        message, files = control.receive_files(self._supervisor)
        if not message:
            self._loop.remove_reader(self._supervisor)
            self._supervisor_left.set()
        if message == control.RELOAD:
            self.reload()
        elif message.startswith(control.FAILED):
            self._service.registry.problem = message.partition(b": ")[2].decode(errors="replace")
        for file in files:
            if message == control.CHANNEL:
                start_task(self._aside, self._attach(socket.socket(fileno=file)))
            elif message == control.SEND_METRICS:
                page = generate_latest(self._service.metrics.registry)
                start_task(self._tasks, control.send_metrics(file, page))
            else:
                self._received += 1
                start_task(self._tasks, self.serve_connections([socket.socket(fileno=file)]))
        self._report()

    async def _attach(self, connection: socket.socket) -> None:
        try:
            await attach(self._service, connection)
        except Exception:  # a new process may import what the sandbox does not
            log.exception("the new models cannot be used here; this process is replaced")
            self.handle_exit(signal.SIGTERM, None)

    async def on_tick(self, counter: int) -> bool:
        """Show that the event loop runs."""
        ends = await super().on_tick(counter)
        if not ends:
            self._report()
            self._replace_if_stuck()
        return ends

    def _replace_if_stuck(self) -> None:
        """End without new connections if a decoder takes too long; the supervisor starts another process."""
        seconds = self._service.settings.decode_seconds
        if self._is_front_end and self._service.decoders.reject_overdue(seconds) and not self._is_stuck:
            self._is_stuck = True
            log.error("a decoder takes longer than %g s; this front end ends and is replaced", seconds)
            self._supervisor.shutdown(socket.SHUT_WR)
            self.handle_exit(signal.SIGTERM, None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Get no more connections, and serve those that are on their way."""
        with contextlib.suppress(OSError):  # done if a decoder was stuck
            self._supervisor.shutdown(socket.SHUT_WR)
        await self._supervisor_left.wait()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await super().shutdown(sockets)


def share_memory(service: Service, settings: Settings, launch_config: Mapping[str, Any]) -> None:
    """Give *service* its share of the memory for uploads and decoded images of the whole server."""
    processes, inference = launch_config["servers"], launch_config["inference"]
    at_rest = resident_bytes(os.getppid()) + processes * resident_bytes()
    at_rest += sum(resident_bytes(process) for process in inference)
    service.max_upload_bytes = upload_budget(settings, processes)
    slot = os.open(f"/proc/self/fd/{launch_config['buckets']}", os.O_RDWR)  # a lock of this process
    service.decoders.share(decode_budget(settings, at_rest, processes), processes, slot)


def run_worker(launch_config: Mapping[str, Any]) -> int:
    """Serve until SIGTERM, or until a runtime of this process is dead; return the exit code."""
    settings = Settings(**launch_config["settings"])
    supervisor = socket.socket(fileno=launch_config["control"])
    bucket_states = control.SharedBucketStates(launch_config["buckets"])
    is_front_end = "channel" in launch_config
    with configured_process(settings):
        options: dict[str, Any] = {"create_bucket_state": bucket_states}
        options["store_kept"] = partial(control.send_kept, supervisor)
        if is_front_end:
            connection = socket.socket(fileno=launch_config["channel"])
            app = create_app({}, settings, create_registry=partial(RemoteRegistry, connection), **options)
        else:
            app = load_app(launch_config["sources"], settings, **options)
        service: Service = app.state.service

        async def collect_metrics() -> bytes:
            return await control.request_metrics(supervisor) or await service.own_metrics()

        service.collect_metrics = collect_metrics
        sources = () if is_front_end else launch_config["sources"]
        server = FrontServer(app, settings, supervisor, sources)
        share_memory(service, settings, launch_config)
        if is_front_end:
            sandbox.apply(settings, server.config)
        return server.serve_until_end()


if __name__ == "__main__":
    sys.exit(run_program(run_worker))
