"""The HTTP face of the models, as an ASGI app that any server can run."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from sopdeploy_service.api import status
from sopdeploy_service.api import v1 as routes
from sopdeploy_service.api import web as pages
from sopdeploy_service.api.direct import Direct
from sopdeploy_service.api.v2 import routes as v2
from sopdeploy_service.http import problems
from sopdeploy_service.http.api_keys import open_ring
from sopdeploy_service.http.auth import METRICS, OPEN, Gate
from sopdeploy_service.http.body_limits import Intake
from sopdeploy_service.http.headers import HeadRequests
from sopdeploy_service.http.middleware import RequestContextMiddleware
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.fault_injection import NO_FAULTS, Faults
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.request_context import OpenTrace
from sopdeploy_service.settings import Settings


def create_app(
    inferences: Mapping[str, LoadedModel],
    settings: Settings,
    shelf: BundleStore | None = None,
    *,
    faults: Faults = NO_FAULTS,
    open_trace: OpenTrace | None = None,
) -> FastAPI:
    """Return the app that answers with *inferences* by name, each as `open_verified` gave it.

    Where models may be loaded later, their bundles are looked up on *shelf*. *faults* go wrong on purpose;
    *open_trace* begins the trace of each request. Raises `ConfigError` where the settings name a file of keys
    that cannot be used.

    `app.state.service` is the `Service` behind it; it lives from the app's startup to its shutdown,
    once.
    """
    service = Service(inferences, settings, shelf, faults)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="sopdeploy",
        version=version("sopdeploy"),
        summary=" with ".join(filter(None, ("Image classification", ", ".join(sorted(inferences))))),
        lifespan=life,
        redirect_slashes=False,  # a redirect would drop the image
        docs_url=None,  # FastAPI's own pages load their scripts from another host
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # `tracing` is ours, and costs less
    )
    app.state.service = service
    app.state.siblings = {}
    app.router.routes.extend(routes.router.routes)  # included, every request would look for its route twice
    for router in (status.router, v2.router, pages.router):
        app.include_router(router)
    problems.install(app)
    app.add_middleware(HeadRequests)
    app.add_middleware(Direct, route=routes.route, readers=routes.PLAIN)
    app.add_middleware(Intake, settings=settings, metrics=service.metrics)
    if settings.keys is not None:
        open_paths = OPEN if settings.metrics_need_key else OPEN | {METRICS}
        app.add_middleware(
            Gate, ring=open_ring(settings.keys), metrics=service.metrics, open_paths=open_paths
        )
    app.add_middleware(RequestContextMiddleware, service=service, open_trace=open_trace)
    return app
