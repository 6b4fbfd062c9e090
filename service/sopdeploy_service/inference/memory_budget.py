"""More models than fit into memory: loaded at the first request, released when others need their memory.

Every bundle is checked at the start, and none is loaded. A request waits until its model is
loaded; first, the models that were used longest ago are released until it fits. Models in use
are never released.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle, read_files
from sopdeploy.errors import ConfigError, SopdeployError
from sopdeploy_service.inference import daemon_threads
from sopdeploy_service.inference.load_time import finish_in_time
from sopdeploy_service.inference.loader import (
    LoadedModel,
    check_trust,
    load_in_background,
)
from sopdeploy_service.inference.model import NOT_LOADED, Model
from sopdeploy_service.inference.model_worker import LocalModel
from sopdeploy_service.inference.results import DRAINING, HttpError, RejectedError
from sopdeploy_service.inference.service import ModelRegistry
from sopdeploy_service.settings import Settings

# Measured in ONNX Runtime on a CPU: a load needs at most twice the graph's file and 64 MB, and
# once more the file, which is sealed in memory meanwhile. Afterwards, at most 1.25 times the
# file and 55 MB remain.
FILE_FACTOR = 3
ACTIVATION_BYTES = 64_000_000
ROOM_SECONDS = 5.0  # how long a load waits for a model that is in use
_POLL_SECONDS = 0.01
RETRY_SECONDS = 60.0  # after a failed load, the bundle is not loaded again for this long

MEMORY_FULL = HttpError("memory_full", 503, "every loaded model is in use; retry later", 1)

log = logging.getLogger("sopdeploy.models")


class NoRuntime:
    """The runtime of a model that is not loaded; runs nothing."""

    name = NOT_LOADED
    device = "none"
    largest_batch = 1

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Raise `NotImplementedError`: requests wait until the model is loaded."""
        raise NotImplementedError

    def close(self) -> None:
        """Do nothing."""


@dataclass(eq=False, slots=True)
class LazyModel:
    """A bundle whose model is assumed to need *bytes*; *placeholder* takes its place while it is not loaded.

    *placeholder* is in use by every request that uses the model or waits for it. After a failed
    load, requests get *load_error*, and no other load is tried before the time *retry_at*.
    """

    placeholder: LocalModel
    bytes: int
    loading: asyncio.Task[HttpError | None] | None = None
    load_error: HttpError | None = None
    retry_at: float = 0.0


class BudgetedRegistry(ModelRegistry):
    """Models by name, of which only as many are loaded as the memory budget of the settings allows."""

    def __init__(self, bundles: Mapping[str, Bundle], settings: Settings) -> None:
        """Check *bundles* as `check_trust` does; raises `ConfigError` for one larger than the budget."""
        super().__init__({}, settings)
        self._budget = settings.memory_budget or 0  # never 0: `load_registry` checks for None
        # By name; the one used longest ago comes first.
        self._lazy_models: OrderedDict[str, LazyModel] = OrderedDict()

        for name, bundle in bundles.items():
            check_trust(bundle, settings)

            graph_bytes = sum(file.bytes for file in bundle.manifest.graph_files.values())
            size = FILE_FACTOR * graph_bytes + ACTIVATION_BYTES
            if size > self._budget:
                sizes = f"{name} needs {size / 1e9:.2f} GB, the budget is {self._budget / 1e9:.2f} GB"
                raise ConfigError(f"memory_budget: {sizes}; raise it")

            # Requests find the model under its name, not loaded.
            not_loaded = LoadedModel(bundle=bundle.reduced(), runtime=NoRuntime(), replays={})
            placeholder = self._by_name[name] = LocalModel(
                name, not_loaded, settings, self.metrics
            )
            self.metrics.model_memory.labels(name).set(0)
            self._lazy_models[name] = LazyModel(placeholder, size)

    async def reload(self, sources: Iterable[str | Path]) -> None:  # noqa: ARG002
        """Log that this is impossible: `LazyModel` has the bundles of the start."""
        log.error("not reloaded: impossible with memory_budget")

    @contextmanager
    def use(self, model: Model) -> Iterator[None]:
        """Mark *model* as used last, and do not release it, loaded or not, during the block."""
        self._lazy_models.move_to_end(model.name)
        # The placeholder counts the users, because it stays the same before and after a load.
        with super().use(self._lazy_models[model.name].placeholder):
            yield

    async def wait_until_loaded(self, model: Model) -> Model:
        """Load *model*, which must be in use, or wait for a load that has begun; return the loaded model.

        Raises `RejectedError` if it cannot be loaded or no other model can be released for it.
        """
        lazy = self._lazy_models[model.name]
        if lazy.loading is None:
            lazy.loading = asyncio.create_task(self._load(lazy))
        reason = await asyncio.shield(lazy.loading)  # another request may wait for it

        if reason is not None:
            raise RejectedError(reason)
        return self._by_name[model.name]

    def close(self, reason: HttpError) -> None:
        """Give *reason* to every image without an outcome, and `DRAINING` to waiting requests."""
        for lazy in self._lazy_models.values():
            if lazy.loading is not None:
                # Not at once: a task that has not begun would end without the `DRAINING` of
                # `_load`.
                asyncio.get_running_loop().call_soon(lazy.loading.cancel)
        super().close(reason)

    async def _load(self, lazy: LazyModel) -> HttpError | None:
        """Load *lazy* when earlier loads have ended; return the error for waiting requests if it fails.

        Models that nobody uses are released to make room. For `RETRY_SECONDS` after a failed
        load, the bundle is not loaded, and the error is the same. After `MEMORY_FULL`, the next
        request tries again.
        """
        name = lazy.placeholder.name

        # One load after another; a failed one is not tried again at once.
        try:
            async with self.changing:
                if time.monotonic() < lazy.retry_at:
                    return lazy.load_error
                await self._make_room(lazy.bytes)
                await self._replace_placeholder(lazy)
            return None
        except RejectedError as error:
            return error.reason
        except asyncio.CancelledError:  # only `close` cancels a load
            return DRAINING
        except Exception as error:  # every waiting request gets a response
            is_bug = not isinstance(error, SopdeployError)
            self.metrics.count_load_failure(error)
            log.error("%s: cannot be loaded: %s", name, str(error), exc_info=is_bug)

            message = f"{name}: cannot be loaded; the server's log says why"
            lazy.load_error = HttpError("load_failed", 500, message)
            lazy.retry_at = time.monotonic() + RETRY_SECONDS
            return lazy.load_error
        finally:
            lazy.loading = None

    async def _replace_placeholder(self, lazy: LazyModel) -> None:
        """Load the bundle of *lazy* and serve it; raises what the load raises."""
        name = lazy.placeholder.name
        reduced = lazy.placeholder.bundle  # without the graph
        reading = daemon_threads.start(partial(read_files, reduced.path, reduced.manifest))
        bundle = await finish_in_time(reading, reduced.path, self._settings)
        loaded = await load_in_background(bundle, self._settings)

        # Serve it, and count it.
        self._by_name[name] = self._start_model(name, loaded)
        self.metrics.model_memory.labels(name).set(lazy.bytes)
        self.metrics.model_loads.labels(name).inc()
        log.info("%s: loaded", name)

    async def _make_room(self, needed: int) -> None:
        """Release models until *needed* bytes are free; raises `RejectedError` if too many are in use."""
        end = time.monotonic() + ROOM_SECONDS
        while True:
            # Add up the memory of the models that are loaded.
            loaded = [
                lazy
                for name, lazy in self._lazy_models.items()
                if self._by_name[name].is_loaded
            ]
            if sum(lazy.bytes for lazy in loaded) + needed <= self._budget:
                return

            # `use` counts users of placeholders and moves the model last, so the first is the
            # longest unused.
            if unused := [
                lazy.placeholder for lazy in loaded if lazy.placeholder.unused.is_set()
            ]:
                await self._release(unused[0])
            elif time.monotonic() >= end:
                raise RejectedError(MEMORY_FULL)
            else:
                await asyncio.sleep(_POLL_SECONDS)

    async def _release(self, placeholder: LocalModel) -> None:
        """Stop the model that *placeholder* replaces; requests for it wait until it can be loaded again."""
        name = placeholder.name
        model = self._by_name[name]
        self._by_name[name] = placeholder
        await model.stop()

        self.metrics.count_bundle(name, model.bundle, model.runtime.name, -1)
        self.metrics.model_memory.labels(name).set(0)
        log.info("%s: released", name)
