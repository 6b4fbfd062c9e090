"""The HTTP face of one bundle, as an ASGI app that any server can run."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from sopdeploy_service import pages, problems
from sopdeploy_service.middleware import Envelope
from sopdeploy_service.open_inference import Inference
from sopdeploy_service.routes import router
from sopdeploy_service.service import Service
from sopdeploy_service.settings import Settings


def create_app(inference: Inference, settings: Settings) -> FastAPI:
    """Return the app that answers with *inference*, as `open_verified` gave it.

    `app.state.service` is the `Service` behind it; it lives from the app's startup to its shutdown,
    once.
    """
    service = Service(inference, settings)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="sopdeploy",
        version=version("sopdeploy"),
        summary=f"Image classification with {inference.bundle.name}",
        lifespan=life,
        redirect_slashes=False,  # a redirect would drop the image
        docs_url=None,  # FastAPI's own pages load their scripts from another host
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(router)
    app.include_router(pages.router)
    problems.install(app)
    paths = frozenset(getattr(route, "path", "") for route in (*router.routes, *pages.router.routes))
    app.add_middleware(Envelope, service=service, routes=paths)
    return app
