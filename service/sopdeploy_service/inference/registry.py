"""The models of one server by name, their versions and how they are replaced.

A name has one current model. A new version is loaded, verified and started beside it; then the name points to
the new one, in one step on the event loop. The previous version stays loaded, so that a rollback is the same
step. The version before that is stopped when its last request has its response.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.errors import SopdeployError, shorten
from sopdeploy.evaluation.drift import counts_for
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.fault_injection import NO_FAULTS, Faults
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import DRAINING, Rejection
from sopdeploy_service.inference.shadow import Shadow, Submit, plan_shadow
from sopdeploy_service.observability.metrics import Metrics, ShadowMetrics
from sopdeploy_service.settings import Settings

NOT_CONTROLLED = Rejection(
    "model_control_off", 403, "models cannot be changed while this server runs; start it with --model-control"
)

log = logging.getLogger("sopdeploy.models")


@dataclass(slots=True)
class Versions:
    """The current model of a name and the one a rollback returns to."""

    current: Model
    previous: Model | None = None


class ModelRegistry:
    """The loaded models. Every method is called on the event loop."""

    def __init__(
        self,
        loaded: Mapping[str, LoadedModel],
        settings: Settings,
        metrics: Metrics,
        store: BundleStore | None,
        faults: Faults = NO_FAULTS,
        submit: Submit | None = None,
    ) -> None:
        """Register *loaded* by name. Without a *store* clients cannot load or unload models.

        *submit* queues an image at a model; a shadow needs it. Raises `ConfigError` for a shadow that is not
        among *loaded* or has other classes.
        """
        self._faults = faults
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._changing = asyncio.Lock()
        self._retiring: dict[Model, asyncio.Task[None]] = {}
        plan = plan_shadow(settings.shadow, loaded)
        self.shadow: Shadow | None = None
        if plan is not None and submit is not None:
            model = self._make_model(plan.name, plan.loaded, is_shadow=True)
            counted = ShadowMetrics(metrics, plan.name)
            self.shadow = Shadow(plan, model, counted, is_idle=self._is_idle, submit=submit)
        served = {name: model for name, model in loaded.items() if plan is None or name != plan.name}
        self._by_name = {name: Versions(self._make_model(name, model)) for name, model in served.items()}

    def start(self) -> None:
        """Start the worker threads of every model."""
        for model in self.models():
            model.start()
        if self.shadow is not None:
            self.shadow.model.start()

    def models(self) -> list[Model]:
        """Return every loaded model, by name, the current version before the previous one."""
        pairs = [(versions.current, versions.previous) for _, versions in sorted(self._by_name.items())]
        return [model for pair in pairs for model in pair if model is not None]

    def find(self, name: str | None = None, version: str | None = None) -> Model | Rejection:
        """Find the model with *name* and *version*; by default, the only model and its current version."""
        if name is None:
            if not self._by_name:
                return Rejection("no_model", 503, "no model is loaded", 5)
            if len(self._by_name) > 1:
                listed = shorten(sorted(self._by_name))
                return Rejection(
                    "model_needed", 400, f"the server has several models; choose one with ?model= ({listed})"
                )
            (name,) = self._by_name
        if name not in self._by_name:
            listed = shorten(sorted(self._by_name)) or "none"
            return Rejection("unknown_model", 404, f"no model {name[:100]!r}; available: {listed}")
        versions = self._by_name[name]
        for model in (versions.current, versions.previous):
            if model is not None and version in {None, model.version}:
                return model
        message = f"{name}: no version {str(version)[:100]!r}; the current one is {versions.current.version}"
        return Rejection("unknown_version", 404, message)

    async def load(self, name: str, folder: str | None = None) -> Model | Rejection:
        """Serve the bundle in *folder*, or the only new bundle of that *name*, as *name*.

        It is loaded and verified in a thread while the current model serves requests. A bundle that cannot be
        served is a rejection and changes nothing.
        """
        async with self._changing:
            if self._store is None:
                return NOT_CONTROLLED
            versions = self._by_name.get(name)
            if self.shadow is not None and name == self.shadow.plan.name:
                return Rejection(
                    "cannot_load", 400, f"{name}: is the shadow; promote it, or choose another name"
                )
            try:
                serving = versions.current.version if versions else None
                path = self._store.find(name, folder, serving=serving)
                known = self.find(name, read_manifest(path).id)  # a folder may have got another bundle
                if versions is not None and isinstance(known, Model):
                    return known if known is versions.current else self._swap(versions)
                loaded = await asyncio.to_thread(load_model, path, self._settings)
            except SopdeployError as error:
                return Rejection("cannot_load", 400, str(error))
            return self._serve(name, loaded)

    async def follow(self, bundles: Mapping[str, Path], load: Callable[[Path], LoadedModel]) -> None:
        """Serve exactly *bundles*, by name; versions that are already loaded are not loaded again.

        New bundles are loaded by *load*, in a thread, before any of them is served. Its errors, and
        `BundleError` for a path without a bundle, are raised here and change nothing.
        """
        async with self._changing:
            wanted: dict[str, Model | LoadedModel] = {}
            with ExitStack() as stack:
                for name, path in bundles.items():
                    version = (await asyncio.to_thread(read_manifest, path)).id
                    known = self.find(name, version)
                    if isinstance(known, Model):
                        wanted[name] = known
                    else:
                        wanted[name] = loaded = await asyncio.to_thread(load, path)
                        stack.callback(loaded.runtime.close)  # unless all of them can be loaded
                stack.pop_all()
            for name, model in wanted.items():
                if isinstance(model, LoadedModel):
                    self._serve(name, model)
                elif model is not self._by_name[name].current:
                    self._swap(self._by_name[name])
            for name in set(self._by_name) - set(bundles):
                self._remove(name)

    async def roll_back(self, name: str) -> Model | Rejection:
        """Serve the previous version of *name* again."""
        async with self._changing:
            current = self.find(name)
            if isinstance(current, Rejection):
                return current
            versions = self._by_name[name]
            if versions.previous is None:
                return Rejection("no_previous_version", 409, f"{name}: no previous version is loaded")
            return self._swap(versions)

    async def promote(self, name: str) -> Model | Rejection:
        """Serve the shadow *name* instead of the live model, which stays loaded for a rollback.

        The shadow is not loaded again: its runtime serves requests after its last shadow batch.
        """
        async with self._changing:
            shadow = self.shadow
            if shadow is None or shadow.plan.name != name:
                return Rejection("no_shadow", 409, f"{name[:100]!r}: is not the shadow of a model")
            self.shadow = None
            loaded = await shadow.end()
            self._metrics.count_bundle(name, shadow.model.bundle, shadow.model.loaded.runtime, -1)
            if loaded is None:
                return Rejection("shadow_failed", 409, f"{name}: the model worker of this shadow has stopped")
            return self._serve(shadow.plan.live, loaded)

    async def unload(self, name: str) -> Rejection | None:
        """Stop serving *name*; requests that use it still get their responses."""
        async with self._changing:
            if self._store is None:
                return NOT_CONTROLLED
            current = self.find(name)
            if isinstance(current, Rejection):
                return current
            self._remove(name)
            return None

    def close(self, rejection: Rejection) -> None:
        """Give *rejection* to every image without an outcome."""
        for model in (*self.models(), *self._retiring):
            model.close(rejection)

    async def stop(self) -> None:
        """Stop every model."""
        if self.shadow is not None:
            self.shadow.model.close(DRAINING)
            await self.shadow.model.stop()
        for task in self._retiring.values():
            task.cancel()
        await asyncio.gather(*(model.stop() for model in (*self.models(), *self._retiring)))

    def _is_idle(self) -> bool:
        return all(model.is_idle for model in self.models())

    def _make_model(self, name: str, loaded: LoadedModel, *, is_shadow: bool = False) -> Model:
        loaded = replace(loaded, runtime=self._faults.wrap_runtime(loaded.runtime))
        self._count(name, loaded)
        return Model(name, loaded, self._settings, self._metrics, is_shadow=is_shadow)

    def _count(self, name: str, loaded: LoadedModel) -> None:
        """Add *loaded* to the metrics as a loaded bundle."""
        self._metrics.count_bundle(name, loaded.bundle, loaded.runtime, 1)
        if loaded.bundle.manifest.rejection is not None:
            self._metrics.unknown_images.labels(name)  # shows 0 before the first unknown image
        if loaded.fast_decode is not None:
            self._metrics.fast_drift.labels(name).set(loaded.fast_decode.drift)
            self._metrics.fast_agreement.labels(name).set(loaded.fast_decode.agreement)
        decision = loaded.bundle.manifest.decision
        if decision is not None and decision.reference is not None:
            self._metrics.show_drift(name, counts_for(decision, len(loaded.bundle.labels)).tests)

    def _serve(self, name: str, loaded: LoadedModel) -> Model:
        model = self._make_model(name, loaded)
        model.start()
        before = self._by_name.get(name)
        self._by_name[name] = Versions(model, before.current if before else None)
        if before is not None and before.previous is not None:
            self._retire(before.previous)
        log.info("%s: now serving %s", name, model.bundle.name)
        return model

    def _swap(self, versions: Versions) -> Model:
        """Exchange the current and the previous version; return the new current one."""
        if versions.previous is not None:
            versions.current, versions.previous = versions.previous, versions.current
            log.info("%s: back to %s", versions.current.name, versions.current.bundle.name)
        return versions.current

    def _remove(self, name: str) -> None:
        versions = self._by_name.pop(name)
        for model in (versions.current, versions.previous):
            if model is not None:
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
            self._metrics.count_bundle(model.name, model.bundle, model.loaded.runtime, -1)
