"""The process of a device, or a front end, which the template of this module forks for the supervisor.

The process of a device loads the models. It then serves HTTP, with connections from the
supervisor, or is the device process of front ends. A front end serves HTTP with the models of device processes.
"""

import asyncio
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

from fastapi import FastAPI
from prometheus_client import generate_latest
from uvicorn.loops.auto import auto_loop_factory

from sopdeploy.base.environment import exit_process
from sopdeploy.bundle.sealed import map_memory, read_memory
from sopdeploy.errors import ConfigError, SopdeployError
from sopdeploy_service.app import create_app
from sopdeploy_service.devices import control
from sopdeploy_service.devices.channel import ChannelError
from sopdeploy_service.devices.control import Status
from sopdeploy_service.devices.device_process import DeviceProcess
from sopdeploy_service.devices.processes import ANY_DEVICE, LaunchConfig
from sopdeploy_service.devices.remote import DeviceChannel, RemoteRegistry
from sopdeploy_service.devices.template import wait_for_launch
from sopdeploy_service.http.api_keys import Key, KeyFile, KeyRing
from sopdeploy_service.inference.decoders import decode_budget, upload_budget
from sopdeploy_service.inference.model import Registry
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.pages import Shared
from sopdeploy_service.runtime.device_memory import resident_bytes
from sopdeploy_service.server.draining_server import DrainingServer, freeze_objects
from sopdeploy_service.server.lifetime import BEAT_SECONDS, USER_ERROR
from sopdeploy_service.server.process import configured_process, find_links, load_registry
from sopdeploy_service.tasks import start_task
from sopdeploy_service.templates import end_with_parent

# Of a process that loads, or waits for a device process
STARTING = Status(received=0, open=0, bundles=None)


class DeviceServer(DrainingServer):
    """A server whose connections come from the *supervisor*."""

    def __init__(
        self,
        app: FastAPI,
        config: LaunchConfig,
        supervisor: socket.socket,
        links: Mapping[Path, Path],
    ) -> None:
        super().__init__(app, config.settings, config.sources, links)
        self._supervisor = supervisor

        self._num_received = 0  # connections
        self._has_keys = True

        # The page of metrics, which the supervisor will send.
        self._page: asyncio.Future[bytes] | None = None
        self._supervisor_left = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._attaching: set[asyncio.Task[None]] = set()

    def on_open(self, sockets: Sequence[socket.socket]) -> None:  # noqa: ARG002
        """Listen to the supervisor, which passes on connections after the first report."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._supervisor, self._receive)

    def _report(self) -> None:
        """Report the `Status` of this process to the supervisor."""
        # With connections that are being accepted, which are tasks.
        num_open = len(self.server_state.connections) + len(self._tasks)

        registry = self._service.registry
        Status(
            self._num_received,
            num_open,
            self.bundles,
            works=registry.problem is None,
            has_keys=self._has_keys,
            lost=frozenset(registry.lost if isinstance(registry, RemoteRegistry) else ()),
        ).send(self._supervisor)

    def _receive(self) -> None:
        """Act on a message of the supervisor; an empty one says that it has ended or sends no more."""
        message = control.receive_message(self._supervisor)

        if not message.kind:
            self._loop.remove_reader(self._supervisor)
            self._supervisor_left.set()

        # Messages that need no file. A client counts also if this process can open no file for
        # its connection.
        if message.kind == control.RELOAD:
            self.reload_bundles()
        if message.kind == control.CLIENT:
            self._num_received += 1

        # Messages whose files may be missing.
        if message.kind == control.KEYS:
            self._use_keys(message.files)
        elif message.kind == control.CHANNEL:
            self._use_channel(message.rest.decode(), message.files)
        else:
            for file in message.files:
                self._use_file(message.kind, file)

        self._report()

    def _use_file(self, kind: bytes, file: int) -> None:
        """Act on a message of the *kind* that came with a *file*."""
        if kind == control.SEND_METRICS:
            page = generate_latest(self._service.metrics.registry)
            start_task(self._tasks, control.send_metrics(file, page))
        elif kind == control.PAGE and self._page is not None and not self._page.done():
            self._page.set_result(read_memory(file))
        elif kind == control.CLIENT:
            start_task(self._tasks, self.serve_connections([socket.socket(fileno=file)]))
        else:  # also a page that is late
            os.close(file)

    def _use_channel(self, device_process: str, files: Sequence[int]) -> None:
        """Use the channel to *device_process* in *files*, which are none if this process had no free file."""
        # Only a front end gets channels.
        registry = cast(RemoteRegistry, self._service.registry)
        if not files:
            registry.lost.add(device_process)
        for file in files:
            connection = socket.socket(fileno=file)
            start_task(self._attaching, registry.attach(device_process, connection))

    def _use_keys(self, files: Sequence[int]) -> None:
        """Accept the keys in the first of *files*; the states of their limits are in the second.

        Without a free file for them, this process reports that it has no keys.
        """
        self._has_keys = len(files) == 2
        if not self._has_keys:
            for file in files:
                os.close(file)
            return

        keys_file, limits_file = files
        self._app.state.keys.replace(read_shared_keys(keys_file), map_states(limits_file))

    async def _reload_keys(self) -> bool:
        """Do nothing: the supervisor reads the file of the keys, and sends them."""
        return True

    async def collect_metrics(self) -> bytes:
        """Return the page of the supervisor with the metrics of all processes; if it is late, the own one."""
        self._page = self._loop.create_future()

        control.send_message(self._supervisor, control.METRICS)
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * control.METRICS_SECONDS):
                return await self._page
        return await self._service.make_metrics()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first SIGTERM; only SIGINT ends the drain.

        Another SIGTERM has no effect: it may come from what ends all processes of the server.
        """
        if sig != signal.SIGTERM or not self._drains:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Also report to the supervisor, as long as the server goes on: the event loop runs."""
        ends = await super().on_tick(counter)
        if not ends:
            self._report()
        return ends

    def _stop_accepting(self) -> None:
        """Refuse new requests: the supervisor, which has the port, still passes on connections."""
        self._service.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Get no more connections, and serve those that are on their way."""
        # The supervisor then sends what waits, and closes its end.
        self._supervisor.shutdown(socket.SHUT_WR)
        await self._supervisor_left.wait()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await super().shutdown(sockets)


def main() -> int:
    """Fork processes, and serve in each until its end; return the exit code."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a server reloads on it when it is ready
    config = wait_for_launch()
    end_with_parent(config.supervisor)
    supervisor = socket.socket(fileno=config.control)

    try:
        with configured_process(config.settings):
            if config.device is not None:
                return run_device(config, supervisor)

            registry, config = wait_for_device(config, supervisor)
            return serve_http(config, registry, supervisor, links={})
    except SopdeployError as problem:
        if config.device is None:
            where = f"front end {config.name}: "
        else:
            where = "" if config.device == ANY_DEVICE else f"device {config.name}: "
        sys.stderr.write(f"error: {where}{problem} [{problem.code}]\n")
        return USER_ERROR


def run_device(config: LaunchConfig, supervisor: socket.socket) -> int:
    """Load the models, then serve HTTP or front ends; return the exit code."""
    # Load the bundles. Links are read before: one that moves meanwhile then counts as moved.
    settings = config.settings
    STARTING.send(supervisor)
    links = find_links(config.sources, settings)
    registry = load_registry(
        config.sources, settings, on_progress=partial(STARTING.send, supervisor)
    )

    # A device that is meant to be a GPU must be one.
    runs_on_cpu = any(model.runtime.device == "cpu" for model in registry.models())
    if config.device not in {"cpu", ANY_DEVICE} and runs_on_cpu:
        reason = "no GPU can be used here; install the extra gpu, or serve with --devices cpu"
        raise ConfigError(f"devices: {config.device}: {reason}")

    # Serve HTTP, or the front ends of a device process.
    if config.front_ends == 0:
        return serve_http(config, registry, supervisor, links)
    freeze_objects()  # of the imports, so that garbage collections do not scan them
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(
            DeviceProcess(registry, settings, supervisor, config.sources, links).run()
        )


def wait_for_device(
    config: LaunchConfig, supervisor: socket.socket
) -> tuple[RemoteRegistry, LaunchConfig]:
    """Return the models of the first device process, and *config* with the last keys that came before it.

    `DeviceServer` receives the channels and keys that follow. Reports that this process starts, and
    what it lacks, as long as it waits. Exits if the supervisor ends.
    """
    status = STARTING
    while True:
        status.send(supervisor)
        if not select.select([supervisor], [], [], BEAT_SECONDS)[0]:
            continue

        message = control.receive_message(supervisor)
        if not message.kind:
            raise SystemExit(0)

        # Without the keys, it only waits for its end.
        if message.kind == control.CHANNEL and status.has_keys:
            device_process = message.rest.decode()
            with suppress(ChannelError, IndexError):  # `IndexError`: no free file
                first = DeviceChannel(device_process, socket.socket(fileno=message.files[0]))
                registry = RemoteRegistry([first], config.settings)
                registry.lost.update(status.lost - {device_process})
                return registry, config

            status = status._replace(lost=status.lost | {device_process})
            continue

        # New keys take the place of those before.
        unused_files = message.files
        if message.kind == control.KEYS:
            if len(message.files) == 2:
                keys, limits = message.files
                unused_files = [config.keys, config.limits]
                config = config.model_copy(update={"keys": keys, "limits": limits})
            else:
                status = status._replace(has_keys=False)

        for file in unused_files:
            os.close(file)


def serve_http(
    config: LaunchConfig,
    registry: Registry,
    supervisor: socket.socket,
    links: Mapping[Path, Path],
) -> int:
    """Serve *registry* on the supervisor's connections, in a share of the memory; return the exit code."""
    # Create the app with the keys that the supervisor has read.
    settings = config.settings
    count = config.num_servers
    shared = memoryview(map_memory(config.shared))
    app = create_app(
        registry,
        settings,
        keys=KeyRing(read_shared_keys(config.keys), map_states(config.limits)),
    )

    # Share the memory, and the number of admitted images, with the other processes.
    service: Service = app.state.service
    service.share_admitted(shared[: control.ADMITTED_BYTES].cast("q")[:count], config.position)
    service.num_front_ends = config.front_ends
    service.uploads.budget = upload_budget(settings, count)

    service.decoders.budget = decode_budget(settings, bytes_at_rest(config), count)

    server = DeviceServer(app, config, supervisor, links)
    service.metrics_page = Shared(server.collect_metrics)
    return server.serve_until_end()


def bytes_at_rest(config: LaunchConfig) -> int:
    """Return the memory of all processes of a server without any image; called in one that serves HTTP.

    Each process that serves HTTP, this one and others, counts as much as this one; with front
    ends, the device processes are the rest.
    """
    serving = config.num_servers * resident_bytes()
    return (
        resident_bytes(os.getppid())
        + serving
        + sum(map(resident_bytes, config.device_processes))
    )


def read_shared_keys(file: int) -> tuple[Key, ...]:
    """Read the keys that the supervisor has written to *file*."""
    return KeyFile.model_validate_json(read_memory(file)).key


def map_states(file: int) -> "memoryview[float]":
    """Map the states of the limits of keys, which processes share."""
    return memoryview(map_memory(file)).cast("d")


if __name__ == "__main__":
    exit_process(main())
