"""What Ray imports: the application of a config file's `import_path`."""

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


class Numbers:
    """What was told to Ray, so that what is gone becomes 0 there."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._gauges: dict[str, Gauge] = {}
        self._known: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def tell(self, families: Iterable[Metric]) -> None:
        """Tell Ray every sample of *families*; for all of a name the labels are the same."""
        found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for family in families:
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        for (name, labels), value in {**dict.fromkeys(self._known, 0.0), **found}.items():
            if self._known.get((name, labels)) != value:
                self._gauge(name, tuple(key for key, _ in labels)).set(
                    value, tags={**dict(labels), REPLICA: self._replica}
                )
        self._known = found

    def _gauge(self, name: str, labels: tuple[str, ...]) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, tag_keys=(*labels, REPLICA))
        return self._gauges[name]


NUMBERS_SECONDS = 5.0  # Ray sends them on every ten
QUIET = {"enable_access_log": False}  # ours is the setting `log`


class Arguments(StrictModel):
    """`args` of a config file."""

    settings: dict[str, Any] = pydantic.Field(
        default={}
    )  # by name, as in a settings file; what is not said is the default


class OnRay(Replica):
    """A replica with the hooks that Ray Serve looks for by name."""

    _telling: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app; Ray runs its start and its end."""
        self.watch()
        self._telling = asyncio.get_running_loop().create_task(self._tell())
        self.asgi.add_middleware(Unnamed)
        return self.asgi

    def __del__(self) -> None:
        """End; Ray calls this after the last answer and the app's own end."""
        if self._telling is not None:
            self._telling.cancel()
        self.close()

    async def _tell(self) -> None:
        numbers = Numbers(serve.get_replica_context().replica_id.unique_id)
        while True:
            await asyncio.sleep(NUMBERS_SECONDS)
            numbers.tell(self.service.metrics.families())


class Unnamed:
    """Wraps *app*; its answers go without `X-Request-ID`, which Ray's proxy sets, and to the same value."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, unnamed)


def build(arguments: Arguments) -> serve.Application:
    """Return the application of a config file, whose deployment says how many replicas there are."""
    return application(OnRay, arguments.settings)


def application(replica: type[OnRay], settings: dict[str, Any], **options: Any) -> serve.Application:
    """Return the application of *replica* under *settings*; *options* are those of a Ray Serve deployment."""
    deployment = serve.deployment(serve.ingress()(replica))
    return deployment.options(**{"name": NAME, "logging_config": QUIET, **options}).bind(settings)
