"""The models of an engine process: loaded, replaced and unloaded by number.

A front end knows a model by its number and gets its small files (manifest, labels, probes, model card) in an
archive, so that it needs no access to the bundle. The rules for versions are those of
`inference.registry.ModelRegistry`; `ModelTable` repeats them without an event loop.
"""

import json
import os
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sopdeploy.bundle.folder import MANIFEST, read_manifest
from sopdeploy.errors import SopdeployError
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.engine_process.slots import slot_bytes
from sopdeploy_service.inference.latency import LatencyTable
from sopdeploy_service.inference.loader import LoadedModel, largest_batch, load_model
from sopdeploy_service.inference.model_worker import EventLoop, ModelWorker, QueuedImage, RequestQueue
from sopdeploy_service.inference.results import Rejection

if TYPE_CHECKING:  # an engine process imports no asyncio
    from sopdeploy_service.settings import Settings

SENT = ("certificate.json", "probes.npz", "class_maps.npz", "README.md")
FACTS, LABELS = "engine.json", "labels.json"  # in the archive
JOIN_SECONDS = 2.0
MAX_MESSAGE = 300  # characters, at most 3600 bytes of JSON: the answer must fit into a slot
NO_CONTROL = Rejection("model_control_off", 403, "models cannot be changed while this server runs")

Drop = Callable[[list[QueuedImage]], None]


class EngineModel:
    """A loaded bundle with its queue and its worker thread, known to front ends by *number*."""

    def __init__(self, name: str, number: int, loaded: LoadedModel, settings: "Settings") -> None:
        manifest = loaded.bundle.manifest
        self.name, self.number, self.loaded = name, number, loaded
        self.shape = tuple(manifest.image_shape)
        self.outputs = tuple(output.name for output in manifest.outputs)
        self.slot_bytes = slot_bytes(self.shape, [output.shape for output in manifest.outputs])
        self.largest_batch = largest_batch(loaded.runtime, settings)
        self.queue = RequestQueue(max_delay=settings.max_queue_delay_ms / 1000)
        self.latency = LatencyTable(loaded.timings)
        self.archive = _archive(name, self)
        self._timeout = settings.batch_timeout_seconds
        self._worker = ModelWorker(
            loaded.runtime,
            self.queue,
            self.latency.record,
            None,
            outputs=self.outputs,
            max_batch=self.largest_batch,
        )
        self._thread: threading.Thread | None = None

    def start(self, loop: EventLoop, on_end: Callable[[], None], on_drop: Drop) -> None:
        """Start the worker thread, which settles images on *loop*."""
        self.queue.on_drop = on_drop
        self._thread = threading.Thread(
            target=self._worker.run, args=(loop, on_end), name="model_worker", daemon=True
        )
        self._thread.start()

    def hung_seconds(self) -> float | None:
        """Return the time limit that the running batch has exceeded, or None."""
        started, batches = self._worker.started, tuple(self._worker.in_flight)
        if started is None:
            return None
        images = len(batches[0].items) if batches else 0
        on_gpu = self.loaded.runtime.device.startswith("cuda")
        limit = self._timeout or self.latency.hang_seconds(images, on_gpu=on_gpu)
        return limit if time.monotonic() - started > limit else None

    def stop(self) -> None:
        """End the thread of the closed queue and release the runtime, unless a batch does not end."""
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
            if self._thread.is_alive():
                return
        self.loaded.runtime.close()
        os.close(self.archive)

    def open_archive(self) -> int:
        """Open the archive; every front end needs a file position of its own."""
        return os.open(f"/proc/self/fd/{self.archive}", os.O_RDONLY)


@dataclass(slots=True)
class Versions:
    """The current model of a name and the one a rollback returns to."""

    current: EngineModel
    previous: EngineModel | None = None


class ModelTable:
    """The models by name. One thread at a time changes them."""

    def __init__(self, sources: Sequence[str | Path], settings: "Settings") -> None:
        """Load the bundles at *sources*; raises what `BundleStore` and `load_model` raise."""
        self._settings = settings
        self._store = BundleStore(sources)
        self._numbers = 0
        self.by_name: dict[str, Versions] = {}
        for name, path in self._store.bundles.items():
            self.serve(name, load_model(path, self._settings))

    def models(self) -> dict[str, list[EngineModel]]:
        """Return the current model of each name, followed by the previous one. Thread-safe."""
        return {
            name: [model for model in (versions.current, versions.previous) if model is not None]
            for name, versions in list(self.by_name.items())
        }

    def change(self, operation: str, name: str, folder: str | None) -> Rejection | None:
        """Load, unload or roll back *name*; if that is not possible, change nothing and return the reason."""
        if not self._settings.model_control:
            return NO_CONTROL
        versions = self.by_name.get(name)
        if operation == "load":
            try:
                self._load(name, folder, versions)
            except SopdeployError as error:
                return Rejection("cannot_load", 400, str(error)[:MAX_MESSAGE])
        elif versions is None:
            return Rejection("unknown_model", 404, f"no model {name[:100]!r}")
        elif operation == "unload":
            del self.by_name[name]
        elif versions.previous is None:
            return Rejection("no_previous_version", 409, f"{name}: no previous version is loaded")
        else:
            versions.current, versions.previous = versions.previous, versions.current
        return None

    def _load(self, name: str, folder: str | None, versions: Versions | None) -> None:
        serving = None if versions is None else versions.current.loaded.bundle.manifest.id
        path = self._store.find(name, folder, serving=serving)
        version = read_manifest(path).id  # a folder may have got another bundle
        previous = None if versions is None else versions.previous
        if version == serving:
            return
        if versions is not None and previous is not None and version == previous.loaded.bundle.manifest.id:
            versions.current, versions.previous = previous, versions.current
        else:
            self.serve(name, load_model(path, self._settings))

    def serve(self, name: str, loaded: LoadedModel) -> None:
        """Make *loaded* the current model of *name*; keep the previous model for a rollback."""
        self._numbers += 1
        model = EngineModel(name, self._numbers, loaded, self._settings)
        before = self.by_name.get(name)
        self.by_name[name] = Versions(model, before.current if before else None)


def _archive(name: str, model: EngineModel) -> int:
    """Write the small files of a bundle, and the facts about its runtime for front ends, to a memory file."""
    loaded = model.loaded
    facts: dict[str, Any] = {
        "name": name,
        "path": str(loaded.bundle.path),
        "runtime": loaded.runtime.name,
        "device": loaded.runtime.device,
        "largest_batch": model.largest_batch,
        "timings": loaded.timings,
        "fast_decode": None if loaded.fast_decode is None else loaded.fast_decode.model_dump(),
    }
    file = os.memfd_create("sopdeploy-bundle", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(file), "wb") as output, zipfile.ZipFile(output, "w") as archive:
        archive.writestr(FACTS, json.dumps(facts))
        archive.writestr(MANIFEST, loaded.bundle.manifest.to_bytes())
        archive.writestr(LABELS, json.dumps(loaded.bundle.labels))
        for sent in SENT:
            if (loaded.bundle.path / sent).is_file():
                archive.write(loaded.bundle.path / sent, sent)
    return file
