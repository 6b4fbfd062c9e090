"""The loaded models by name, and how they are replaced while the server runs."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from sopdeploy.bundle.folder import Bundle, read_files
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import SopdeployError
from sopdeploy_service.inference import daemon_threads
from sopdeploy_service.inference.bundle_store import find_bundles
from sopdeploy_service.inference.load_time import finish_in_time
from sopdeploy_service.inference.loader import (
    LoadedModel,
    check_trust,
    load_in_background,
)
from sopdeploy_service.inference.model import Registry, State
from sopdeploy_service.inference.model_worker import LocalModel
from sopdeploy_service.inference.results import HttpError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import (
    Settings,
)

models_log = logging.getLogger("sopdeploy.models")


class ModelRegistry(Registry):
    """The loaded models by name.

    A new bundle is loaded, verified and started beside the one that is served; then the name
    points to the new one, in one step. The replaced one is stopped when its last request has
    its response.
    """

    def __init__(self, loaded: Mapping[str, LoadedModel], settings: Settings) -> None:
        """Register *loaded* by name."""
        self._settings = settings
        self.metrics = Metrics()
        self.changing = asyncio.Lock()  # held while models are loaded or replaced
        self._retiring: dict[LocalModel, asyncio.Task[None]] = {}
        self._by_name: dict[str, LocalModel] = {}

        for name, model in loaded.items():
            self._by_name[name] = LocalModel(name, model, settings, self.metrics)
            self._count_loaded(name, model)

    async def start(self) -> None:
        """Start the worker threads of the models."""
        for model in self._by_name.values():
            model.start()

    @property
    def problem(self) -> State | None:
        """`runtime_dead` if a model cannot run any more, so that the process must be restarted."""
        return (
            "runtime_dead" if any(model.is_down for model in self._by_name.values()) else None
        )

    async def replace(self, bundles: Mapping[str, Bundle]) -> None:
        """Serve exactly *bundles*, by name; those that are already served are not loaded again.

        The caller holds `changing`. All new bundles are loaded before any is served: an error,
        such as of `load_model`, changes nothing.
        """
        # Load all new bundles; if one fails, the runtimes of the others are closed.
        loaded: dict[str, LoadedModel] = {}
        with ExitStack() as stack:
            for name, bundle in bundles.items():
                if self._serves(name, bundle.manifest):
                    check_trust(bundle, self._settings)
                else:
                    loaded[name] = await load_in_background(bundle, self._settings)
                    # Close it if another one cannot be loaded.
                    stack.callback(loaded[name].runtime.close)
            stack.pop_all()

        # Retire the models that *bundles* do not have.
        for name in set(self._by_name) - set(bundles):
            self._retire(self._by_name.pop(name))

        # Start the new models, each in the place of an earlier one.
        for name, new in loaded.items():
            model = self._start_model(name, new)
            if name in self._by_name:
                self._retire(self._by_name[name])
            self._by_name[name] = model

    async def reload(self, sources: Iterable[str | Path]) -> bool:
        """Read the bundles of *sources* again and serve them, or log why not; return whether they are served."""
        try:
            async with self.changing:
                # This reads bundles that are served already, too: a folder may have other files under
                # the same manifest.
                projects = {
                    name: model.bundle.manifest.project for name, model in self._by_name.items()
                }

                finding = daemon_threads.start(
                    partial(find_bundles, sources, self._read, projects)
                )
                bundles = await finish_in_time(finding, "the bundles", self._settings)

                await self.replace(bundles)
        except Exception as error:  # nothing awaits the task of a reload
            is_bug = not isinstance(error, SopdeployError)
            self.metrics.count_load_failure(error)
            models_log.error(
                "not reloaded, the bundles in use stay: %s", str(error), exc_info=is_bug
            )
            return False

        self.metrics.reload_failed.set(0)
        models_log.info(
            "reloaded",
            extra={"bundles": " ".join(model.bundle.name for model in self.models())},
        )
        return True

    def _serves(self, name: str, manifest: Manifest) -> bool:
        """Tell whether the model *name* is that of a bundle with this content."""
        present = self._by_name.get(name)
        return present is not None and present.bundle.manifest.has_content_of(manifest)

    def _read(self, name: str, path: Path, manifest: Manifest) -> Bundle:
        """Read the bundle at *path*, which is to be served as *name*; its graph only if it is new."""
        return read_files(path, manifest, with_graph=not self._serves(name, manifest))

    def close(self, reason: HttpError) -> None:
        """Give *reason* to every image without an outcome."""
        for model in (*self._by_name.values(), *self._retiring):
            model.close(reason)

    async def stop(self) -> None:
        """Stop every model."""
        for task in self._retiring.values():
            task.cancel()
        models = (*self._by_name.values(), *self._retiring)
        await asyncio.gather(*(model.stop() for model in models))

    def _start_model(self, name: str, loaded: LoadedModel) -> LocalModel:
        """Start the model *name*, and count its bundle as loaded; if it cannot start, release its memory."""
        with ExitStack() as unless_started:
            unless_started.callback(loaded.runtime.close)
            model = LocalModel(name, loaded, self._settings, self.metrics)
            model.start()
            unless_started.pop_all()

        self._count_loaded(name, loaded)
        return model

    def _count_loaded(self, name: str, loaded: LoadedModel) -> None:
        self.metrics.count_bundle(name, loaded.bundle, loaded.runtime.name, 1)

    def _retire(self, model: LocalModel) -> None:
        """Stop *model*, which is not served any more, in the background when no request uses it."""
        self._retiring[model] = asyncio.create_task(self._stop_when_unused(model))

    async def _stop_when_unused(self, model: LocalModel) -> None:
        """Stop *model* after the last request that uses it has its response."""
        try:
            await model.unused.wait()
            await model.stop()
        except Exception:  # nothing awaits this task
            models_log.exception("%s: a replaced version did not stop cleanly", model.name)
        finally:
            del self._retiring[model]
            self.metrics.count_bundle(model.name, model.bundle, model.runtime.name, -1)
