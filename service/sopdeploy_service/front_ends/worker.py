"""A process that serves HTTP behind a port it shares with others: that of a device, or a front end.

The supervisor starts this module. A front end has a channel to an inference process and enters the sandbox;
the process of a device runs the models itself.
"""

import asyncio
import functools
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI

from sopdeploy_service.app import create_app
from sopdeploy_service.front_ends import sandbox
from sopdeploy_service.front_ends.balancing import Balancer, join_group, receive
from sopdeploy_service.front_ends.memory import PixelMemory
from sopdeploy_service.front_ends.monitoring import collect
from sopdeploy_service.front_ends.rate_limits import SharedSpending
from sopdeploy_service.front_ends.remote import RemoteRegistry
from sopdeploy_service.observability.logs import Timeline
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.http_protocol import Connections
from sopdeploy_service.server.launch import run_program
from sopdeploy_service.server.process import DrainingServer, configured_process, load_app, ready_line
from sopdeploy_service.settings import Settings


class BalancedServer(DrainingServer):
    """A server that shares its connections with other processes, which send theirs to *inbox*."""

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        ready: str,
        timeline: Timeline,
        *,
        balancer: Balancer,
        inbox: socket.socket,
    ) -> None:
        connections = Connections(settings, app.state.service.metrics, balancer=balancer)
        super().__init__(app, settings, ready, timeline, connections)
        self._balancer, self._inbox = balancer, inbox
        self._receiving: set[asyncio.Task[None]] = set()

    async def on_open(self) -> None:
        """Accept connections from other processes."""
        waiting, _ = receive(self._inbox)  # left by a process that has ended
        await self.serve_connections(waiting)
        self._balancer.join()
        asyncio.get_running_loop().add_reader(self._inbox, self._receive)

    def _receive(self) -> None:
        serving = asyncio.get_running_loop().create_task(self.serve_last())
        self._receiving.add(serving)
        serving.add_done_callback(self._receiving.discard)

    async def serve_last(self) -> None:
        """Serve the connections of clients and of other processes that wait in the inbox."""
        clients, processes = receive(self._inbox)
        for connection in clients:
            await self.serve_connections([connection], received=True)
            self._balancer.set_taken()
        await self.serve_connections(processes, received=True)

    async def on_tick(self, counter: int) -> bool:
        """Show that the event loop runs."""
        self._balancer.beat()
        return await super().on_tick(counter)

    def start_drain(self) -> None:
        """Get no more connections."""
        super().start_drain()
        self._balancer.leave()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Get no more connections; after the death of a runtime, the supervisor passes on pending ones."""
        self._balancer.leave()
        asyncio.get_running_loop().remove_reader(self._inbox)
        await super().shutdown(sockets)


def serve(launch_config: Mapping[str, Any]) -> int:
    """Serve until SIGTERM, or until a runtime or the inference process is dead; return the exit code."""
    settings = Settings(**launch_config["settings"])
    listener = socket.socket(fileno=launch_config["listener"])
    balancer, inbox = join_group(launch_config["group"])
    spending = SharedSpending(*launch_config["spending"])
    is_front_end = "channel" in launch_config
    with configured_process(settings) as (timeline, open_trace):
        options: dict[str, Any] = {"open_trace": open_trace, "create_bucket": spending.create_bucket}
        if is_front_end:
            app, names = create_front_end(launch_config, settings, options)
            timeline.mark("inference process")
        else:
            app, names = load_app(launch_config["sources"], settings, timeline, **options)
        siblings = {
            name: functools.partial(balancer.connect, index)
            for name, index in launch_config["siblings"].items()
        }
        app.state.collect_metrics = functools.partial(collect, siblings)
        ready = ready_line(listener, names)
        server = BalancedServer(app, settings, ready, timeline, balancer=balancer, inbox=inbox)
        if is_front_end:
            sandbox.apply(settings, server.config)
            timeline.mark("sandbox")
        return server.serve_until_end(listener)


def create_front_end(
    launch_config: Mapping[str, Any], settings: Settings, options: Mapping[str, Any]
) -> tuple[FastAPI, Sequence[str]]:
    """Create the app of a front end; return it with the names of the bundles of the inference process."""
    connection = socket.socket(fileno=launch_config["channel"])
    memory = PixelMemory(launch_config["memory"])

    def create_registry(settings: Settings, metrics: Metrics) -> RemoteRegistry:
        return RemoteRegistry(connection, memory, settings, metrics)

    app = create_app({}, settings, create_registry=create_registry, **options)
    return app, [model.bundle.name for model in app.state.service.registry.models()]


if __name__ == "__main__":
    sys.exit(run_program(serve))
