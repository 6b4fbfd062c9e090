"""The small files of a bundle and the facts about its runtime, which a front end gets instead of the bundle.

A front end therefore needs no access to files.
"""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sopdeploy.bundle.class_maps import read_class_maps
from sopdeploy.bundle.folder import MANIFEST, SMALL_FILES, Bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.http_api import FastDecode
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import Model
from sopdeploy_service.runtime.base import Runtime

FACTS, LABELS = "runtime.json", "labels.json"


@dataclass(slots=True)
class RemoteRuntime:
    """What a front end knows of a runtime, which only the inference process runs and closes."""

    name: str
    device: str
    largest_batch: int


def archive_model(model: Model) -> bytes:
    """Write the archive of *model*."""
    loaded = model.loaded
    facts: dict[str, Any] = {
        "name": model.name,
        "runtime": loaded.runtime.name,
        "device": loaded.runtime.device,
        "largest_batch": model.largest_batch,
        "timings": loaded.timings,
        "decode": loaded.decode,
        "fast_decode": None if loaded.fast_decode is None else loaded.fast_decode.model_dump(),
    }
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        archive.writestr(FACTS, json.dumps(facts))
        archive.writestr(MANIFEST, loaded.bundle.manifest.to_bytes())
        archive.writestr(LABELS, json.dumps(loaded.bundle.labels))
        for file in (loaded.bundle.path / name for name in SMALL_FILES):
            if file.is_file():
                archive.writestr(file.name, file.read_bytes())
    return output.getvalue()


def read_model(data: bytes) -> tuple[str, LoadedModel]:
    """Read the result of `archive_model`; return the name of the model and the model."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    facts: dict[str, Any] = json.loads(archive.read(FACTS))
    manifest = Manifest.from_bytes(archive.read(MANIFEST))
    folder = cast(Path, zipfile.Path(archive))  # has the methods that readers of bundles use
    fast_decode = facts["fast_decode"]
    return facts["name"], LoadedModel(
        bundle=Bundle(path=folder, manifest=manifest, labels=tuple(json.loads(archive.read(LABELS)))),
        runtime=cast(Runtime, RemoteRuntime(facts["runtime"], facts["device"], facts["largest_batch"])),
        replays={},
        timings=tuple((images, seconds) for images, seconds in facts["timings"]),
        decode=facts["decode"],
        fast_decode=None if fast_decode is None else FastDecode(**fast_decode),
        class_maps=read_class_maps(folder, manifest),
    )
