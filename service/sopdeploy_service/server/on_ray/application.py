"""The Ray Serve application that a config file names in `import_path`."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pydantic
from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve
from ray.util.metrics import Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy.config import StrictModel
from sopdeploy_service.server.on_ray.plan import NAME
from sopdeploy_service.server.on_ray.replica import Replica

REPLICA = "replica"
METRICS_SECONDS = 5.0  # Ray exports metrics every ten seconds
LOGGING_CONFIG = {"enable_access_log": False}  # the setting `log` configures our own


class RayMetrics:
    """Copies Prometheus samples to Ray gauges; a sample that disappears becomes 0."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._gauges: dict[str, Gauge] = {}
        self._known: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def update(self, families: Iterable[Metric]) -> None:
        """Copy every sample of *families*; all samples of a name have the same labels."""
        found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for family in families:
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        for (name, labels), value in {**dict.fromkeys(self._known, 0.0), **found}.items():
            if self._known.get((name, labels)) != value:
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, tag_keys=(*(key for key, _ in labels), REPLICA))
                self._gauges[name].set(value, tags={**dict(labels), REPLICA: self._replica})
        self._known = found


class Arguments(StrictModel):
    """`args` of a config file."""

    settings: dict[str, Any] = pydantic.Field(default={})  # by name, as in a settings file


class OnRay(Replica):
    """A replica with the hooks that Ray Serve finds by name."""

    _reporter: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Give Ray the app; Ray runs its startup and shutdown."""
        self.watch()
        self._reporter = asyncio.get_running_loop().create_task(self._report_metrics())
        self.asgi.add_middleware(RemoveRequestId)
        return self.asgi

    def __del__(self) -> None:
        """Close the replica; Ray calls this after the last response and the app's shutdown."""
        if self._reporter is not None:
            self._reporter.cancel()
        self.close()

    async def _report_metrics(self) -> None:
        metrics = RayMetrics(serve.get_replica_context().replica_id.unique_id)
        while True:
            await asyncio.sleep(METRICS_SECONDS)
            metrics.update(self.service.metrics.registry.collect())


class RemoveRequestId:
    """Middleware that removes `X-Request-ID` from responses: Ray's proxy adds the same header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def filtered(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, filtered)


def build(arguments: Arguments) -> serve.Application:
    """Build the application of a config file, whose deployment sets the number of replicas."""
    return application(OnRay, arguments.settings)


def application(replica: type[OnRay], settings: dict[str, Any], **options: Any) -> serve.Application:
    """Bind *replica* with *settings* and Ray Serve deployment *options*."""
    deployment = serve.deployment(serve.ingress()(replica))
    return deployment.options(**{"name": NAME, "logging_config": LOGGING_CONFIG, **options}).bind(settings)
