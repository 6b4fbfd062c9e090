"""The ASGI app of the service, for any server."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.metadata import version

from fastapi import FastAPI

from sopdeploy.errors import ConfigError
from sopdeploy_service.api import status, v1, web
from sopdeploy_service.api.v2 import routes as v2
from sopdeploy_service.http import problems
from sopdeploy_service.http.api_keys import load_keys
from sopdeploy_service.http.middleware import (
    METRICS,
    OPEN,
    ApiKeyMiddleware,
    BodyLimitsMiddleware,
    RequestContextMiddleware,
)
from sopdeploy_service.http.rate_limits import MAX_KEYS, SharedSpending
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.engine_process.client import EngineClient
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.request_context import OpenTrace
from sopdeploy_service.settings import Settings

PARTS = (  # optional modules with a function `install`, which adds routes and observers
    "sopdeploy_service.shadow",
)


def create_app(
    models: Mapping[str, LoadedModel],
    settings: Settings,
    store: BundleStore | None = None,
    *,
    open_trace: OpenTrace | None = None,
    engine: EngineClient | None = None,
    spending: SharedSpending | None = None,
) -> FastAPI:
    """Create the app that serves *models* by name, each loaded by `load_model`.

    With *engine*, the models run in an engine process. *store* has the bundles that clients may load later,
    *open_trace* starts the trace of a request, and *spending* holds the rate
    limits that the front ends of a server share. `app.state.service` is the `Service` of the app; it runs
    once, from startup to shutdown. Raises `ConfigError` if the key file of *settings* cannot be used.
    """
    keys = None if settings.keys is None else load_keys(settings.keys)
    if keys is not None and spending is not None and len(keys.keys) > MAX_KEYS:
        raise ConfigError(
            f"{settings.keys}: has more than {MAX_KEYS} keys, the limit with front_ends; remove some"
        )
    service = Service(models, settings, store, engine)
    names = sorted({model.name for model in service.registry.models()})

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="sopdeploy",
        version=version("sopdeploy"),
        summary=" with ".join(filter(None, ("Image classification", ", ".join(names)))),
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would lose the image
        docs_url=None,  # FastAPI's pages load scripts from other hosts
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # sopdeploy has its own
    )
    app.state.service = service
    app.state.siblings = {}
    for router in (v1.router, status.router, v2.router, web.router):
        app.router.routes += router.routes  # `include_router` would add a second matching step per request
    for part in PARTS:
        import_module(part).install(app, service)
    problems.install(app)
    if keys is not None:  # the middleware that is added last runs first
        open_paths = OPEN if settings.metrics_need_key else OPEN | {METRICS}
        app.add_middleware(
            ApiKeyMiddleware, keys=keys, metrics=service.metrics, open_paths=open_paths, shared=spending
        )
    app.add_middleware(BodyLimitsMiddleware, settings=settings, metrics=service.metrics)
    app.add_middleware(RequestContextMiddleware, service=service, open_trace=open_trace)
    return app
