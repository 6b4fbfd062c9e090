"""The models of one server by name, and how a reload replaces them.

A new bundle is loaded, verified and started beside the one that is served; then the name points to the new
one, in one step on the event loop. The replaced one is stopped when its last request has its response.
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

log = logging.getLogger("sopdeploy.models")


class ModelRegistry:
    """The loaded models. Every method is called on the event loop."""

    def __init__(self, loaded: Mapping[str, LoadedModel], settings: Settings, metrics: Metrics) -> None:
        """Register *loaded* by name."""
        self._settings = settings
        self._metrics = metrics
        self.changing = asyncio.Lock()  # held while models are loaded or replaced
        self._retiring: dict[Model, asyncio.Task[None]] = {}
        self._by_name = {name: self._make_model(name, model) for name, model in loaded.items()}

    async def start(self) -> None:
        """Start the worker threads of every model."""
        for model in self.models():
            model.start()

    def models(self) -> list[Model]:
        """Return every model that requests can choose, by name."""
        return [model for _, model in sorted(self._by_name.items())]

    def find(self, name: str | None = None, version: str | None = None) -> Model:
        """Find the model with *name*, by default the only one; it must have *version*, if this is given.

        Raises `RejectedError` if there is none.
        """
        if name is None:
            name = self._only_name()
        if name not in self._by_name:
            listed = shorten(sorted(self._by_name)) or "none"
            message = f"no model {name[:100]!r}; available: {listed}"
            raise RejectedError(HttpError("unknown_model", 404, message))
        model = self._by_name[name]
        if version not in {None, model.version}:
            message = f"{name}: no version {str(version)[:100]!r}; the current one is {model.version}"
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
        if len(self._by_name) > 1:
            names = shorten(sorted(self._by_name))
            message = f"the server has several models; choose one with ?model= ({names})"
            raise RejectedError(HttpError("model_needed", 400, message))
        return next(iter(self._by_name))

    async def follow(self, bundles: Mapping[str, Path], load: Callable[[Path], LoadedModel]) -> None:
        """Serve exactly *bundles*, by name; those that are already served are not loaded again.

        New bundles are loaded by *load*, in a thread, before any of them is served. Its errors, and
        `BundleError` for a path without a bundle, are raised here and change nothing.
        """
        async with self.changing:
            loaded: dict[str, LoadedModel] = {}
            with ExitStack() as stack:
                for name, path in bundles.items():
                    manifest = await asyncio.to_thread(read_manifest, path)
                    # By its id: a folder may have got another bundle.
                    if name not in self._by_name or self._by_name[name].version != manifest.id:
                        loaded[name] = await asyncio.to_thread(load, path)
                        stack.callback(loaded[name].runtime.close)  # unless all of them can be loaded
                stack.pop_all()
            for name in set(self._by_name) - set(bundles):
                self._retire(self._by_name.pop(name))
            for name, new in loaded.items():
                model = self._make_model(name, new)
                model.start()
                if name in self._by_name:
                    self._retire(self._by_name[name])
                self._by_name[name] = model

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
        log.info("reloaded", extra={"bundles": " ".join(model.bundle.name for model in self.models())})

    def close(self, reason: HttpError) -> None:
        """Give *reason* to every image without an outcome."""
        for model in (*self.models(), *self._retiring):
            model.close(reason)

    async def stop(self) -> None:
        """Stop every model."""
        for task in self._retiring.values():
            task.cancel()
        await asyncio.gather(*(model.stop() for model in (*self.models(), *self._retiring)))

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
