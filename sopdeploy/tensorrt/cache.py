"""The engine cache: a plan and a JSON record per key, in `engines/<bundle>/` beside the bundle.

A plan is native code for one GPU model and one TensorRT version. It is loaded only if the key and the sha256
in its record match; a cache miss returns its reason. The hash detects damage, not an attacker: everyone who
can write to the folder can run code.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import to_json
from sopdeploy.errors import EngineError
from sopdeploy.files import atomic_write, writing
from sopdeploy.tensorrt.record import EngineKey, EngineRecord

_FOLDER = "engines"
EMPTY = "no engine of this bundle was built here yet"


class StoredEngine(NamedTuple):
    """A cached plan whose key and hash were verified, and its record."""

    plan: bytes
    record: EngineRecord


def cache_folder(bundle: Bundle, folder: Path | None = None) -> Path:
    """Return the cache folder of *bundle*, in *folder* or beside the bundle."""
    parent = folder if folder is not None else bundle.path.resolve().parent / _FOLDER
    return parent / bundle.name


def store_engine(folder: Path, plan: bytes, record: EngineRecord) -> Path:
    """Write *plan* and then its *record* atomically; return the path of the plan."""
    path = folder / f"{record.key.name}.plan"
    write_atomically(path, plan)
    write_atomically(path.with_suffix(".json"), to_json(record.model_dump(mode="json")))
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write *content* to *path* atomically, also if several processes write it; raise `EngineError`."""
    with writing(path, EngineError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, shared=True) as partial:
            partial.write_bytes(content)


def load_engine(folder: Path, key: EngineKey) -> StoredEngine | str:
    """Read the plan of *key* in *folder* and verify it; return the reason if there is none."""
    path = folder / f"{key.name}.plan"
    if not path.with_suffix(".json").is_file():
        return _describe_nearest(folder, key)
    record = _read_record(path.with_suffix(".json"))
    if record is None or not path.is_file():
        return f"{path.stem} has no valid record or no plan"
    if record.key != key:
        return f"{path.name} is an engine of another key: {'; '.join(key.differences(record.key))}"
    plan = path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != record.plan_sha256:
        return f"{path.name} does not have the sha256 of its record: it was damaged or replaced"
    return StoredEngine(plan, record)


def _read_record(path: Path) -> EngineRecord | None:
    try:
        return EngineRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def records(folder: Path) -> list[EngineRecord]:
    """Read every valid record in *folder*, sorted by file name."""
    results = (_read_record(path) for path in sorted(folder.glob("*.json")))
    return [record for record in results if record is not None]


def _describe_nearest(folder: Path, key: EngineKey) -> str:
    """Describe how the cached engine that is most similar to *key* differs from it."""
    differences = sorted((key.differences(record.key) for record in records(folder)), key=len)
    return f"the nearest engine here was built for {'; '.join(differences[0])}" if differences else EMPTY


def load_best_engine(
    folder: Path, bundle: Bundle, *, tensorrt: str, gpu: str, architecture: str
) -> StoredEngine | str:
    """Load the engine of *bundle* with the largest batch size for the given TensorRT version and GPU.

    *architecture* is the compute capability, such as `sm_90`. A miss returns its reason.
    """
    keys = [record.key for record in records(folder)]
    if not keys:
        return EMPTY
    required = {
        "bundle": bundle.name,
        "bundle_onnx": bundle.manifest.files[bundle.onnx.name].sha256,
        "tensorrt": tensorrt,
        "gpu": gpu,
        "architecture": architecture,
        "precision": bundle.manifest.precision,
    }
    matching = [key for key in keys if key.model_copy(update=required) == key]
    if not matching:
        return _describe_nearest(folder, keys[0].model_copy(update=required))
    return load_engine(
        folder, max(matching, key=lambda key: (key.largest_batch, len(key.profiles), key.name))
    )
