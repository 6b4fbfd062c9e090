"""The ASGI app of the service, for any server."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from sopdeploy.errors import ConfigError
from sopdeploy_service.api import aliases, status, v1, web
from sopdeploy_service.api.v2 import routes as v2
from sopdeploy_service.http import problems
from sopdeploy_service.http.api_keys import KeyRing, keys_of_server
from sopdeploy_service.http.middleware import (
    METRICS_PATH,
    OPEN,
    AllowedOrigins,
    Guard,
    KeyGuard,
    OriginGuard,
    RequestContextMiddleware,
)
from sopdeploy_service.http.query_route import DirectRoutes
from sopdeploy_service.inference.daemon_threads import DaemonThreads
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import Registry
from sopdeploy_service.inference.model_registry import ModelRegistry
from sopdeploy_service.inference.service import Service
from sopdeploy_service.keep import Keeper
from sopdeploy_service.settings import Settings, is_loopback

ROUTERS = v1.router, status.router, v2.router, web.router, aliases.router
PATHS = [str(getattr(route, "path", "")) for router in ROUTERS for route in router.routes]


def create_app(
    models: Mapping[str, LoadedModel] | Registry,
    settings: Settings,
    *,
    keys: KeyRing | None = None,
) -> FastAPI:
    """Create the app that serves *models* by name, each loaded by `load_model`, or a registry of models.

    *keys* are the content of the key file, if it was read before. `app.state.service` is the
    `Service`, `app.state.keys` the `KeyRing` or None. Raises `ConfigError` if the key file or
    `root_path` of *settings* cannot be used, `DataError` for `examples`, and `StorageError` if the
    folder `keep` cannot be written.
    """
    # Read the keys, if the settings name a file and no other process has read it.
    if settings.keys is None:
        keys = None
    elif keys is None:
        keys = KeyRing(keys_of_server(settings.keys))

    # A proxy removes the prefix, so no path of the server may begin with it.
    prefix = settings.root_path.split("/")[:2]  # the names before and after the first slash
    if any(path.split("/")[:2] == prefix for path in PATHS if path != "/"):
        reason = "begins like a path of the server itself, so a proxy could not remove it; choose another one"
        raise ConfigError(f"root_path: {settings.root_path} {reason}")

    # Build the service and, if the settings name a folder, what keeps photos in it.
    registry = models if isinstance(models, Registry) else ModelRegistry(models, settings)
    service = Service(registry, settings)
    decoders = service.decoders
    keeper = None
    if settings.keep is not None:
        keeper = Keeper(
            settings.keep,
            settings,
            service.metrics,
            copy=lambda image: decoders.wait_for(
                decoders.copy(image)
            ),  # in the keeper's thread
        )
        service.keep = keeper.offer

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # So that no work that hangs, such as reading a network disk, delays the exit.
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        await service.start()
        if keeper is not None:
            keeper.start()
        yield
        if keeper is not None:
            # The keeper ends before the service, whose decoders make its copies.
            await asyncio.to_thread(keeper.stop)
        await service.stop()

    # Build the app.
    names = sorted({model.name for model in service.registry.models()})
    app = FastAPI(
        title="sopdeploy",
        version=version("sopdeploy"),
        summary="Image classification" + (f" with {', '.join(names)}" if names else ""),
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would lose the image
        # FastAPI would make the document for each request, and its pages load scripts from
        # other hosts.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )

    # What the routes read.
    app.state.service = service
    app.state.keys = keys
    app.state.examples = web.list_examples(settings.examples)

    for router in ROUTERS:
        app.include_router(router)
    problems.handle_errors(app, PATHS)

    # The last one added is the outermost.
    guards = _list_guards(settings, keys)
    app.add_middleware(DirectRoutes, routes=v1.router.routes)
    app.add_middleware(RequestContextMiddleware, service=service, guards=guards)
    if settings.allowed_origins:
        app.add_middleware(AllowedOrigins, origins=settings.allowed_origins)
    return app


def _list_guards(settings: Settings, keys: KeyRing | None) -> list[Guard]:
    """List what may refuse a request before its route: foreign pages and hosts, and a missing key."""
    guards: list[Guard] = []
    # Without keys, any web page could send requests to this machine, under a name that leads to
    # it (DNS rebinding). With another address, the names by which clients reach this host are
    # known only if given.
    if settings.allowed_hosts or (keys is None and is_loopback(settings.host)):
        guards.append(OriginGuard(settings))
    if keys is not None:
        guards.append(KeyGuard(keys, OPEN | {METRICS_PATH}))
    return guards
