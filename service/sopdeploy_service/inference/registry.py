"""The models of one server by name, their versions and how they are replaced.

A name has one current model. A new version is loaded, verified and started beside it; then the name points to
the new one, in one step on the event loop. The previous version stays loaded, so that a rollback is the same
step. The version before that is stopped when its last request has its response.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.errors import SopdeployError, shorten
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

NOT_CONTROLLED = HttpError(
    "model_control_off", 403, "models cannot be changed while this server runs; start it with --model-control"
)

log = logging.getLogger("sopdeploy.models")


class ModelRegistry:
    """The loaded models. Every method is called on the event loop."""

    is_replaced = False  # by the supervisor, if the models are dead
    problem: str | None = None  # why they are dead, until then

    def __init__(
        self,
        loaded: Mapping[str, LoadedModel],
        settings: Settings,
        metrics: Metrics,
        store: BundleStore | None,
    ) -> None:
        """Register *loaded* by name. Without a *store* clients cannot load or unload models."""
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self.changing = asyncio.Lock()  # held while a model is loaded, replaced or removed
        self._retiring: dict[Model, asyncio.Task[None]] = {}
        # The current version of a name and, once it was replaced, the previous one.
        self._by_name = {name: [self._make_model(name, model)] for name, model in loaded.items()}

    async def start(self) -> None:
        """Start the worker threads of every model."""
        for model in self.models():
            model.start()

    def models(self) -> list[Model]:
        """Return every loaded model, by name, the current version before the previous one."""
        return [model for _, versions in sorted(self._by_name.items()) for model in versions]

    def find(self, name: str | None = None, version: str | None = None) -> Model:
        """Find the model with *name* and *version*; by default, the only model and its current version.

        Raises `RejectedError` if there is none.
        """
        if name is None:
            name = self._only_name()
        if name not in self._by_name:
            listed = shorten(sorted(self._by_name)) or "none"
            message = f"no model {name[:100]!r}; available: {listed}"
            raise RejectedError(HttpError("unknown_model", 404, message))
        current = self._by_name[name][0]
        model = current if version is None else self._loaded_version(name, version)
        if model is None:
            message = f"{name}: no version {str(version)[:100]!r}; the current one is {current.version}"
            raise RejectedError(HttpError("unknown_version", 404, message))
        return model

    def use(self, name: str | None = None, version: str | None = None) -> AbstractContextManager[Model]:
        """Find a model as `find` does, and keep it loaded during the block.

        Every request gets its model here.
        """
        return self.find(name, version).in_use()

    async def wait_until_loaded(self, model: Model) -> Model:
        """Return *model*, which is loaded already."""
        return model

    def _only_name(self) -> str:
        if not self._by_name:
            raise RejectedError(HttpError("no_model", 503, "no model is loaded", 5))
        if len(self._by_name) > 1:
            names = shorten(sorted(self._by_name))
            message = f"the server has several models; choose one with ?model= ({names})"
            raise RejectedError(HttpError("model_needed", 400, message))
        return next(iter(self._by_name))

    def _loaded_version(self, name: str, version: str) -> Model | None:
        """Return the model with *name* and *version*, or None if it is not loaded."""
        models = (model for model in self._by_name.get(name, ()) if model.version == version)
        return next(models, None)

    async def load(self, name: str, folder: str | None = None) -> Model:
        """Serve the bundle in *folder*, or the only new bundle of that *name*, as *name*.

        It is loaded and verified in a thread while the current model serves requests. For a bundle that
        cannot be served, `RejectedError` is raised and nothing changes.
        """
        async with self.changing:
            if self._store is None:
                raise RejectedError(NOT_CONTROLLED)
            versions = self._by_name.get(name)
            try:
                path = self._store.find(name, folder, serving=versions[0].version if versions else None)
                # By its id: a folder may have got another bundle.
                model: Model | LoadedModel | None = self._loaded_version(name, read_manifest(path).id)
                if model is None:
                    model = await asyncio.to_thread(load_model, path, self._settings)
            except SopdeployError as error:
                raise RejectedError(HttpError("cannot_load", 400, str(error))) from error
            return self._make_current(name, model)

    async def follow(self, bundles: Mapping[str, Path], load: Callable[[Path], LoadedModel]) -> None:
        """Serve exactly *bundles*, by name; versions that are already loaded are not loaded again.

        New bundles are loaded by *load*, in a thread, before any of them is served. Its errors, and
        `BundleError` for a path without a bundle, are raised here and change nothing.
        """
        async with self.changing:
            wanted: dict[str, Model | LoadedModel] = {}
            with ExitStack() as stack:
                for name, path in bundles.items():
                    manifest = await asyncio.to_thread(read_manifest, path)
                    known = self._loaded_version(name, manifest.id)
                    if known is None:
                        loaded = await asyncio.to_thread(load, path)
                        stack.callback(loaded.runtime.close)  # unless all of them can be loaded
                    wanted[name] = loaded if known is None else known
                stack.pop_all()
            for name, model in wanted.items():
                self._make_current(name, model)
            for name in set(self._by_name) - set(bundles):
                self._remove(name)

    async def reload(self, sources: Iterable[str | Path]) -> None:
        """Find the bundles of *sources* again and `follow` them, or log why this is not possible."""
        try:
            store = await asyncio.to_thread(BundleStore, sources)
            await self.follow(
                store.bundles, lambda path: load_model(path, self._settings, store.checked.get(path))
            )
        except Exception as error:  # nothing awaits the task of a reload
            is_bug = not isinstance(error, SopdeployError)
            log.error("not reloaded, the bundles in use stay: %s", str(error), exc_info=is_bug)
            return
        if self._store is not None:
            self._store = store
        else:  # clients cannot roll back
            for versions in self._by_name.values():
                while len(versions) > 1:
                    self._retire(versions.pop())
        log.info("reloaded", extra={"bundles": " ".join(model.bundle.name for model in self.models())})

    async def roll_back(self, name: str) -> Model:
        """Serve the previous version of *name* again; raises `RejectedError` if none is loaded."""
        async with self.changing:
            self.find(name)
            versions = self._by_name[name]
            if len(versions) == 1:
                message = f"{name}: no previous version is loaded"
                raise RejectedError(HttpError("no_previous_version", 409, message))
            return self._make_current(name, versions[1])

    async def unload(self, name: str) -> None:
        """Stop serving *name*; requests that use it still get their responses.

        Raises `RejectedError` if it is not loaded.
        """
        async with self.changing:
            if self._store is None:
                raise RejectedError(NOT_CONTROLLED)
            self.find(name)
            self._remove(name)

    def close(self, reason: HttpError) -> None:
        """Give *reason* to every image without an outcome."""
        for model in self._all():
            model.close(reason)

    async def stop(self) -> None:
        """Stop every model."""
        for task in self._retiring.values():
            task.cancel()
        await asyncio.gather(*(model.stop() for model in self._all()))

    def _all(self) -> list[Model]:
        return [*self.models(), *self._retiring]

    def _make_model(self, name: str, loaded: LoadedModel) -> Model:
        self.count(name, loaded, 1)
        return Model(name, loaded, self._settings, self._metrics)

    def count(self, name: str, loaded: LoadedModel, change: int) -> None:
        """Count *loaded* in the metrics as loaded (*change* 1) or unloaded (-1)."""
        self._metrics.count_bundle(name, loaded.bundle, loaded.runtime, change)
        if change < 0:
            return
        if loaded.bundle.manifest.rejection is not None:
            self._metrics.unknown_images.labels(name)  # shows 0 before the first unknown image
        decision = loaded.bundle.manifest.decision
        if decision is not None and decision.reference is not None:
            self._metrics.show_drift(name)

    def _make_current(self, name: str, model: Model | LoadedModel) -> Model:
        """Make *model* the current version of *name*; start it if it is new. `changing` must be held.

        The current version comes first in `_by_name`, then the one before it; older versions are retired.
        """
        if isinstance(model, LoadedModel):
            model = self._make_model(name, model)
            model.start()
        versions = self._by_name.get(name, [])
        if model in versions[:1]:
            return model
        self._by_name[name] = [model, *versions[:1]]
        for other in versions[1:]:
            if other is not model:
                self._retire(other)
        log.info("%s: now serving %s", name, model.bundle.name)
        return model

    def _remove(self, name: str) -> None:
        for model in self._by_name.pop(name):
            self._retire(model)
        log.info("%s: unloaded", name)

    def _retire(self, model: Model) -> None:
        self._retiring[model] = asyncio.create_task(self._stop_unused(model))

    async def _stop_unused(self, model: Model) -> None:
        """Stop *model* after the last request that uses it has its response."""
        try:
            await model.unused.wait()
            await model.stop()
        except Exception:  # nothing awaits this task
            log.exception("%s: a replaced version did not stop cleanly", model.name)
        finally:
            del self._retiring[model]
            self.count(model.name, model.loaded, -1)
