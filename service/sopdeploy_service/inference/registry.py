"""The models of one server by name, and how one takes another's place without a request noticing.

A name has one current model. A new version is opened, verified and started beside it; then the name points
to the new one, in one step on the event loop. The one before stays loaded: going back to it is the same
step. The one before that ends when its last request has its answer.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sopdeploy.errors import SopdeployError
from sopdeploy_service.inference.bundle_store import BundleStore, id_of
from sopdeploy_service.inference.fault_injection import NO_FAULTS, Faults
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import DRAINING, Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

log = logging.getLogger("sopdeploy.models")


@dataclass(slots=True)
class Versions:
    """What a name stands for: the model that answers, and the one it may go back to."""

    current: Model
    previous: Model | None = None


class ModelRegistry:
    """Every method is called on the event loop."""

    def __init__(
        self,
        inferences: Mapping[str, LoadedModel],
        settings: Settings,
        metrics: Metrics,
        shelf: BundleStore | None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self._faults = faults
        self._settings = settings
        self._metrics = metrics
        self._shelf = shelf
        self._changing = asyncio.Lock()
        self._leaving: dict[Model, asyncio.Task[None]] = {}
        self._by_name = {name: Versions(self._model(name, found)) for name, found in inferences.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that answer, sorted."""
        return tuple(sorted(self._by_name))

    @property
    def dead(self) -> bool:
        """Return whether an engine has died."""
        return any(model.dead for model in self.models())

    def models(self) -> list[Model]:
        """Return every loaded model, by name, the current version before the previous."""
        pairs = [(found.current, found.previous) for _, found in sorted(self._by_name.items())]
        return [model for pair in pairs for model in pair if model is not None]

    def find(self, name: str | None = None, version: str | None = None) -> Model | Rejection:
        """Return the model that *name* and *version* mean; no name is the only one."""
        if name is None:
            if len(self._by_name) != 1:
                return no_name(self.names)
            name = next(iter(self._by_name))
        if name not in self._by_name:
            return unknown(name, self.names)
        found = self._by_name[name]
        for model in (found.current, found.previous):
            if model is not None and version in {None, model.version}:
                return model
        return unknown_version(name, str(version), found.current.version)

    def start(self) -> None:
        """Start every engine."""
        for model in self.models():
            model.start()

    async def load(self, name: str, folder: str | None = None) -> Model | Rejection:
        """Let the bundle in *folder*, or the only new one of that *name*, answer for *name*.

        It is opened and verified in a thread while the model before it goes on answering. A bundle that
        cannot be served is a refusal, and nothing changes.
        """
        async with self._changing:
            if self._shelf is None:
                return NOT_CONTROLLED
            known = self._by_name.get(name)
            try:
                path = self._shelf.find(name, folder, serving=known.current.version if known else None)
                if known is not None and path == known.current.bundle.path:
                    return known.current
                if known is not None and known.previous is not None and path == known.previous.bundle.path:
                    return self._turn(known, known.previous)
                inference = await asyncio.to_thread(load_model, path, self._settings)
            except SopdeployError as problem:
                return Rejection("cannot_load", 400, str(problem))
            return self._take_over(name, inference)

    async def follow(self, bundles: Mapping[str, Path], open_bundle: Callable[[Path], LoadedModel]) -> None:
        """Let exactly *bundles* answer, by name; of a version that is loaded already nothing is opened anew.

        Every new one is opened by *open_bundle*, in a thread, before the first takes over: what that raises,
        or `BundleError` where there is none, is raised here, and nothing has changed.
        """
        async with self._changing:
            wanted: dict[str, Model | LoadedModel] = {}
            for name, path in bundles.items():
                version = await asyncio.to_thread(id_of, path)
                known = self._loaded(name, version)
                wanted[name] = known if known else await asyncio.to_thread(open_bundle, path)
            for name, found in wanted.items():
                if isinstance(found, LoadedModel):
                    self._take_over(name, found)
                elif found is not self._by_name[name].current:
                    self._turn(self._by_name[name], found)
            for name in set(self._by_name) - set(bundles):
                self._drop(name)

    async def roll_back(self, name: str) -> Model | Rejection:
        """Let the version before the current one answer for *name* again."""
        async with self._changing:
            if name not in self._by_name:
                return unknown(name, self.names)
            found = self._by_name[name]
            if found.previous is None:
                return Rejection("no_previous_version", 409, f"{name}: no earlier version is loaded")
            return self._turn(found, found.previous)

    async def unload(self, name: str) -> Rejection | None:
        """Let *name* answer no more; requests that are with it still get their answers."""
        async with self._changing:
            if self._shelf is None:
                return NOT_CONTROLLED
            if name not in self._by_name:
                return unknown(name, self.names)
            self._drop(name)
            return None

    def close(self, refusal: Rejection) -> None:
        """Give *refusal* to everything without an outcome."""
        for model in (*self.models(), *self._leaving):
            model.close(refusal)

    async def stop(self) -> None:
        """End every engine."""
        self.close(DRAINING)
        for task in self._leaving.values():
            task.cancel()
        await asyncio.gather(*(model.stop() for model in (*self.models(), *self._leaving)))

    def _model(self, name: str, inference: LoadedModel) -> Model:
        inference = replace(inference, runtime=self._faults.over(inference.runtime))
        self._metrics.serves(name, inference.bundle, inference.runtime)
        if inference.fast_decode is not None:
            self._metrics.decodes_fast(name, inference.fast_decode.drift, inference.fast_decode.agreement)
        return Model(name, inference, self._settings, self._metrics)

    def _loaded(self, name: str, version: str) -> Model | None:
        found = self.find(name, version)
        return found if isinstance(found, Model) else None

    def _drop(self, name: str) -> None:
        found = self._by_name.pop(name)
        for model in (found.current, found.previous):
            self._retire(model)
        log.info("%s: unloaded", name)

    def _take_over(self, name: str, inference: LoadedModel) -> Model:
        model = self._model(name, inference)
        model.start()
        known = self._by_name.get(name)
        self._by_name[name] = Versions(model, known.current if known else None)
        if known is not None:
            self._retire(known.previous)
        log.info("%s: %s answers now", name, model.bundle.name)
        return model

    def _turn(self, found: Versions, model: Model) -> Model:
        found.current, found.previous = model, found.current
        log.info("%s: back to %s", model.name, model.bundle.name)
        return model

    def _retire(self, model: Model | None) -> None:
        if model is None:
            return
        self._leaving[model] = asyncio.create_task(self._end(model))

    async def _end(self, model: Model) -> None:
        try:
            await model.retire()
        except Exception:  # a mistake of ours, in a task that nobody waits for
            log.exception("%s: a version that was replaced did not end well", model.name)
        finally:
            del self._leaving[model]
            self._metrics.serves_no_more(model.name, model.bundle, model.loaded.runtime)


NOT_CONTROLLED = Rejection(
    "model_control_off", 403, "models are loaded at the start only; start the server with --model-control"
)


def no_name(names: tuple[str, ...]) -> Rejection:
    """Return the refusal of a request that names no model where there is not exactly one."""
    if not names:
        return Rejection("no_model", 503, "no model is loaded", 5)
    listed = ", ".join(names)
    return Rejection("model_needed", 400, f"several models answer here; say which with ?model= ({listed})")


def unknown(name: str, names: tuple[str, ...]) -> Rejection:
    """Return the refusal of a request for a model that is not here."""
    return Rejection(
        "unknown_model", 404, f"no model {name[:100]!r} here; there is: {', '.join(names) or 'none'}"
    )


def unknown_version(name: str, version: str, current: str) -> Rejection:
    """Return the refusal of a request for a version that is not loaded."""
    return Rejection(
        "unknown_version", 404, f"{name}: no version {version[:100]!r} here; {current} is current"
    )
