"""The Ray Serve application that a config file names in `import_path`."""

import asyncio
import os
from dataclasses import dataclass
from typing import Any, TypeAlias

import pydantic
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve._private import replica as internals
from ray.util.metrics import Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy.config import StrictModel
from sopdeploy.environment import CLUSTER_VARIABLE
from sopdeploy_service.server.on_ray.plan import NAME
from sopdeploy_service.server.on_ray.replica import Replica

REPLICA = "replica"
_METRICS_SECONDS = 5.0  # Ray exports metrics every ten seconds
Sample: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]  # name, labels with their values
LOGGING_CONFIG = {"enable_access_log": False}  # the setting `log` configures sopdeploy's access log


if os.environ.get(CLUSTER_VARIABLE) == "0":  # Ray has no option for the port of a replica
    add_port = internals.add_port_to_grpc_server
    internals.add_port_to_grpc_server = lambda server, address: add_port(
        server, address.replace("[::]", "127.0.0.1")
    )


async def copy_metrics(registry: CollectorRegistry) -> None:
    """Copy the samples of *registry* to Ray gauges forever; a sample that disappears becomes 0.

    All samples of a name have the same labels.
    """
    replica = serve.get_replica_context().replica_id.unique_id
    gauges: dict[str, Gauge] = {}
    previous: dict[Sample, float] = {}
    while True:
        await asyncio.sleep(_METRICS_SECONDS)
        current: dict[Sample, float] = {}
        for family in registry.collect():
            for sample in family.samples:
                current[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        for (name, labels), value in {**dict.fromkeys(previous, 0.0), **current}.items():
            if previous.get((name, labels)) != value:
                if name not in gauges:
                    gauges[name] = Gauge(name, tag_keys=(*(key for key, _ in labels), REPLICA))
                gauges[name].set(value, tags={**dict(labels), REPLICA: replica})
        previous = current


class Arguments(StrictModel):
    """`args` of a config file."""

    settings: dict[str, Any] = pydantic.Field(default={})  # by name, as in a settings file


class OnRay(Replica):
    """A replica with the methods that Ray Serve calls by their names."""

    _copying: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app to Ray, which runs its startup and shutdown."""
        self.watch()
        copying = copy_metrics(self.service.metrics.registry)
        self._copying = asyncio.get_running_loop().create_task(copying)
        self.asgi.add_middleware(RemoveRequestId)
        return self.asgi

    def __del__(self) -> None:
        """Close the replica; Ray calls this after the last response and the app's shutdown."""
        if self._copying is not None:
            self._copying.cancel()
        self.close()


@dataclass(eq=False)
class RemoveRequestId:
    """Middleware that removes `X-Request-ID` from responses: Ray's proxy adds the same header."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def filtered(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self.app(scope, receive, filtered)


def build_application(arguments: Arguments) -> serve.Application:
    """Build the application of a config file, whose deployment sets the number of replicas."""
    return application(OnRay, arguments.settings)


def application(replica: type[OnRay], settings: dict[str, Any], **options: Any) -> serve.Application:
    """Bind *replica* with *settings* and Ray Serve deployment *options*."""
    deployment = serve.deployment(serve.ingress()(replica))
    return deployment.options(**{"name": NAME, "logging_config": LOGGING_CONFIG, **options}).bind(settings)
