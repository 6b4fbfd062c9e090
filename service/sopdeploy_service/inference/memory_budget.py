"""More models than fit into memory: loaded at the first request, released when others need their memory.

Every bundle is checked at the start, but only the pinned ones are loaded. A request for another model waits
until it is loaded; first, the models that were used longest ago are released until it fits. Models that are
pinned or in use are never released.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle, keep_in_memory
from sopdeploy.errors import ConfigError, SopdeployError, shorten
from sopdeploy_service.inference.loader import LoadedModel, load_model, open_checked
from sopdeploy_service.inference.model import Model, ModelMemory
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.inference.results import DRAINING, HttpError, RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.device_memory import MemoryMeter, available_bytes, free_gpu_bytes
from sopdeploy_service.runtime.onnxruntime import has_cuda
from sopdeploy_service.settings import Settings

# Measured in ONNX Runtime on a CPU: a load needs at most twice the graph's file and 64 MB. Afterwards, 1.02
# to 1.25 times the file and up to 55 MB for activations remain.
FILE_FACTOR, ACTIVATION_BYTES = 2, 64_000_000
AUTO_SHARE = 0.8  # of the free memory; images, HTTP and batches need the rest
ROOM_SECONDS = 5.0  # how long a load waits for a model that is in use
_POLL_SECONDS = 0.01
RETRY_SECONDS = 60.0  # after a failed load, the bundle is not loaded again for this long

MEMORY_FULL = HttpError("memory_full", 503, "every loaded model is in use or pinned; retry later", 1)

LoadMeasured = Callable[[Path, Settings], tuple[LoadedModel, int]]

log = logging.getLogger("sopdeploy.models")


def load_measured(path: Path, settings: Settings) -> tuple[LoadedModel, int]:
    """Load the bundle at *path*; return it with the bytes that it occupies on its device."""
    meter = MemoryMeter(on_gpu=uses_gpu(settings))
    loaded = load_model(path, settings)
    return loaded, max(meter.growth(loaded.runtime), loaded.bundle.manifest.files["model.onnx"].bytes)


class NoRuntime:
    """The runtime of a model that is not loaded; runs nothing."""

    name, device, largest_batch = "not loaded", "none", 1

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Raise `NotImplementedError`: requests wait until the model is loaded."""
        raise NotImplementedError

    def close(self) -> None:
        """Do nothing."""


@dataclass(eq=False, slots=True)
class BudgetEntry:
    """The bundle at *path*: *model* is *unloaded* while the bundle is not loaded.

    *users* counts the requests that use the model or wait for it. Until the time in *failed*, no load is
    tried again, and requests get its error.
    """

    path: Path
    unloaded: Model
    model: Model
    memory: ModelMemory
    users: int = 0
    loading: asyncio.Task[HttpError | None] | None = None
    failed: tuple[float, HttpError] | None = None


class BudgetedRegistry(ModelRegistry):
    """Models by name, of which only as many are loaded as the memory budget of the settings allows."""

    def __init__(
        self,
        bundles: Mapping[str, Path],
        settings: Settings,
        metrics: Metrics,
        load: LoadMeasured = load_measured,
    ) -> None:
        """Check all *bundles* by name, and load the pinned ones.

        Raises the errors of `load_model`, and `ConfigError` for a pinned name without a bundle and for a
        bundle that does not fit into the budget.
        """
        super().__init__({}, settings, metrics)
        self._load = load
        unknown = set(settings.pin) - set(bundles)
        if unknown:
            raise ConfigError(f"pin: no bundle {min(unknown)}; the bundles are {shorten(sorted(bundles))}")
        self.budget = budget_bytes(settings)
        self._metrics.memory_budget.set(self.budget)
        # The model that was used longest ago comes first.
        self._entries = {name: self._make_entry(name, path) for name, path in bundles.items()}
        for name in settings.pin:
            entry = self._entries[name]
            self._set_loaded(entry, *load(bundles[name], settings))
        pinned = self._used()
        for name, entry in self._entries.items():
            needed = pinned if entry.memory.pinned else pinned + entry.memory.bytes
            if needed > self.budget:
                raise ConfigError(
                    f"memory_budget: {name} and the pinned bundles need about {needed / 1e9:.2f} GB, the "
                    f"budget is {self.budget / 1e9:.2f} GB; raise it or pin fewer bundles"
                )

    async def start(self) -> None:
        """Start the worker threads of the loaded models."""
        for model in self.models():
            if model.is_loaded:
                model.start()

    @contextmanager
    def use(self, name: str | None = None, version: str | None = None) -> Iterator[Model]:
        """Find a model, loaded or not; during the block it is not released."""
        model = self.find(name, version)
        entry = self._entries[model.name] = self._entries.pop(model.name)  # moves it to the end
        entry.users += 1
        try:
            yield model
        finally:
            entry.users -= 1

    async def wait_until_loaded(self, model: Model) -> Model:
        """Load *model*, which must be in use, or wait for a load that has begun; return the loaded model.

        Raises `RejectedError` if it cannot be loaded or no other model can be released for it.
        """
        entry = self._entries[model.name]
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load_entry(entry))
        reason = await asyncio.shield(entry.loading)  # another request may wait for it
        if reason is not None:
            raise RejectedError(reason)
        return entry.model

    def close(self, reason: HttpError) -> None:
        """Give *reason* to every image without an outcome, and `DRAINING` to waiting requests."""
        for entry in self._entries.values():
            if entry.loading is not None:
                entry.loading.cancel()
        super().close(reason)

    def _make_entry(self, name: str, path: Path) -> BudgetEntry:
        bundle = keep_in_memory(open_checked(path, self._settings))
        unloaded = LoadedModel(bundle=bundle, runtime=NoRuntime(), replays={})
        model = Model(name, unloaded, self._settings, self._metrics)
        model.is_loaded = False
        model.memory = ModelMemory(bytes=load_bytes(bundle), pinned=name in self._settings.pin)
        self._by_name[name] = model
        self._metrics.model_memory.labels(name).set(0)
        return BudgetEntry(path, model, model, model.memory)

    def _used(self) -> int:
        """Return the bytes of all loaded models."""
        return sum(entry.memory.bytes for entry in self._entries.values() if entry.model.is_loaded)

    async def _load_entry(self, entry: BudgetEntry) -> HttpError | None:
        """Load *entry* after earlier loads; return the error for waiting requests if it fails."""
        name = entry.model.name
        try:
            async with self.changing:
                if entry.failed is not None and time.monotonic() < entry.failed[0]:
                    return entry.failed[1]
                await self._make_room(entry)
                started = time.monotonic()
                loaded, size = await asyncio.to_thread(self._load, entry.path, self._settings)
                self._set_loaded(entry, loaded, size)
                entry.model.start()
                seconds = time.monotonic() - started
                log.info("%s: loaded", name, extra={"bytes": size, "seconds": round(seconds, 3)})
                try:
                    await self._make_room(entry)  # it may need more than was known
                except RejectedError:
                    await self._release(entry)
                    raise
            return None
        except RejectedError as error:
            return error.reason
        except asyncio.CancelledError:
            return DRAINING
        except Exception as error:  # every waiting request gets a response
            is_bug = not isinstance(error, SopdeployError)
            log.error("%s: cannot be loaded: %s", name, str(error), exc_info=is_bug)
            reason = HttpError("load_failed", 500, f"{name}: cannot be loaded; the server's log says why")
            entry.failed = time.monotonic() + RETRY_SECONDS, reason
            return reason
        finally:
            entry.loading = None

    def _set_loaded(self, entry: BudgetEntry, loaded: LoadedModel, size: int) -> None:
        """Serve *entry* with *loaded*, which occupies *size* bytes, and continue its drift window."""
        name, entry.memory.bytes = entry.model.name, size
        model = entry.model = self._make_model(name, loaded)
        model.continue_from(entry.unloaded)
        self._by_name[name] = model
        self._metrics.model_memory.labels(name).set(size)
        self._metrics.model_loads.labels(name).inc()

    async def _make_room(self, entry: BudgetEntry) -> None:
        """Release models until *entry* fits, too; raises `RejectedError` if that is impossible."""
        needed = 0
        if not entry.model.is_loaded:  # a load needs more memory for a moment
            needed = max(load_bytes(entry.unloaded.bundle), entry.memory.bytes)
        others = [other for other in self._entries.values() if other is not entry]
        pinned = sum(other.memory.bytes for other in others if other.memory.pinned)
        can_fit = pinned + max(needed, entry.memory.bytes) <= self.budget
        end = time.monotonic() + ROOM_SECONDS
        while self._used() + needed > self.budget:
            if not can_fit or time.monotonic() >= end:
                raise RejectedError(MEMORY_FULL)
            loaded = [other for other in others if other.model.is_loaded and not other.memory.pinned]
            unused = [other for other in loaded if not other.users and other.model.is_idle]
            if unused:
                await self._release(unused[0])
            else:
                await asyncio.sleep(_POLL_SECONDS)

    async def _release(self, entry: BudgetEntry) -> None:
        """Stop the model of *entry*; requests for it wait until it can be loaded again."""
        model, entry.model = entry.model, entry.unloaded
        self._by_name[model.name] = entry.unloaded
        await model.stop()
        self.count(model.name, model.loaded, -1)
        self._metrics.model_memory.labels(model.name).set(0)
        log.info("%s: released", model.name)


def load_bytes(bundle: Bundle) -> int:
    """Estimate the bytes that the load of *bundle* needs."""
    return FILE_FACTOR * bundle.manifest.files["model.onnx"].bytes + ACTIVATION_BYTES


def budget_bytes(settings: Settings) -> int:
    """Return the memory budget of *settings*; for `auto`, a share of the memory that is free now.

    Raises `ConfigError` if the free memory is unknown.
    """
    if settings.memory_budget is not None and settings.memory_budget != "auto":
        return settings.memory_budget
    free = free_gpu_bytes() if uses_gpu(settings) else None
    return int(AUTO_SHARE * (available_bytes() if free is None else free))


def uses_gpu(settings: Settings) -> bool:
    """Tell whether the runtime of *settings* may be on a GPU."""
    if settings.runtime == "auto":
        return has_cuda() or find_spec("tensorrt") is not None
    return settings.runtime in {"tensorrt", "onnxruntime-cuda"}
