"""The engine cache: one plan and one JSON file per key, in `engines/<bundle>/` beside the bundle.

A plan is native code for one GPU and one TensorRT. So its bytes are handed out only after the key and the
sha256 in its record are the wanted ones, and whoever asks in vain is told why. The folder must be as
trustworthy as the program itself: a hash finds damage and mistakes, not somebody who may write here.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.record import EngineKey, EngineRecord

FOLDER = "engines"
LARGEST_RECORD = 4_000_000


@dataclass(frozen=True)
class StoredEngine:
    """A plan whose key and hash were checked; `plan` are the very bytes that were hashed."""

    plan: bytes
    record: EngineRecord


@dataclass(frozen=True)
class NoEngine:
    """There is no plan that may be loaded; `reason` says why, in words for the user."""

    reason: str


def cache_folder(bundle: Bundle, folder: Path | None = None) -> Path:
    """Return where the engines of *bundle* lie: in *folder*, or beside the bundle."""
    parent = folder if folder is not None else bundle.path.resolve().parent / FOLDER
    return parent / bundle.name


def store(folder: Path, plan: bytes, record: EngineRecord) -> Path:
    """Write *plan* and then its *record*, each whole under its name or not at all; return the plan's path."""
    path = folder / f"{record.key.name}.plan"
    write_whole(path, plan)
    write_whole(path.with_suffix(".json"), record.to_bytes())
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write *content* to *path* by way of a hidden file that is renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".engine-", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)  # noqa: PTH105
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as problem:
        raise EngineError(
            f"{path}: cannot be written ({problem.strerror}); choose another --cache"
        ) from problem


def look(folder: Path, key: EngineKey) -> StoredEngine | NoEngine:
    """Return the checked plan of *key* in *folder*, or why there is none that may be loaded."""
    path = folder / f"{key.name}.plan"
    if not path.with_suffix(".json").is_file():
        return NoEngine(nearest(folder, key))
    record = read_record(path.with_suffix(".json"))
    if isinstance(record, NoEngine):
        return record
    if record.key != key:
        return NoEngine(f"{path.name} is an engine of another key: {'; '.join(key.differences(record.key))}")
    if not path.is_file() or path.is_symlink():
        return NoEngine(f"{path.name} is missing or a link")
    plan = path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != record.plan_sha256:
        return NoEngine(f"{path.name} has not the sha256 of its record: it was damaged or replaced")
    return StoredEngine(plan=plan, record=record)


def read_record(path: Path) -> EngineRecord | NoEngine:
    """Return the record at *path*, or why it is none."""
    try:
        if path.is_symlink() or path.stat().st_size > LARGEST_RECORD:
            return NoEngine(f"{path.name} is a link, or larger than any record")
        return EngineRecord.from_bytes(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return NoEngine(f"{path.name} is not an engine's record")


def records(folder: Path) -> list[EngineRecord]:
    """Return every readable record in *folder*, in the order of their names."""
    found = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if isinstance(record, EngineRecord)]


def nearest(folder: Path, key: EngineKey) -> str:
    """Say why *folder* has no engine of *key*, by the engine in it that differs least."""
    differences = sorted((key.differences(record.key) for record in records(folder)), key=len)
    if not differences:
        return "no engine of this bundle was built here yet"
    return f"the nearest engine here was built for {'; '.join(differences[0])}"


def best_for(
    folder: Path, bundle: Bundle, *, tensorrt: str, gpu: str, architecture: str
) -> StoredEngine | NoEngine:
    """Return the checked engine of *bundle* for this machine that takes the largest batches."""
    found = records(folder)
    if not found:
        return NoEngine("no engine of this bundle was built here yet")
    here = {
        "bundle": bundle.name,
        "bundle_onnx": bundle.manifest.files[bundle.onnx.name].sha256,
        "tensorrt": tensorrt,
        "gpu": gpu,
        "architecture": architecture,
        "precision": bundle.manifest.precision,
    }
    wanted = [record.key.model_copy(update=here) for record in found]
    fitting = [record.key for record, key in zip(found, wanted, strict=True) if record.key == key]
    if not fitting:
        return NoEngine(nearest(folder, wanted[0]))
    return look(folder, max(fitting, key=lambda key: (key.largest_batch, len(key.profiles), key.name)))
