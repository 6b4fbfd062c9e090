"""The engine cache: a plan and a JSON record per key, in `engines/<bundle>/` beside the bundle.

A plan is native code for one GPU model and one TensorRT version. The key contains everything
that decides whether it can be used; keys are compared field by field, so that a cache miss
states its reason. A plan is loaded only if the key and the sha256 in its record match. The hash
detects damage, not an attacker: everyone who can write to the folder can run code.

The profiles of an engine are the batch sizes that it is built and tuned for. `1,8,32` gives
three disjoint profiles: 1, 2 to 8, and 9 to 32. Each is tuned for its largest batch. Every
batch size has exactly one profile, and single images run without a dynamic dimension.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

from sopdeploy.base.config import Count, NonNegative, StrictModel, matching
from sopdeploy.base.files import MAX_TEXT_BYTES, atomic_write, read_file, writing
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange, Sha256, to_json
from sopdeploy.bundle.probes import Replay
from sopdeploy.errors import ConfigError
from sopdeploy.paths import MAX_WEIGHTS_BYTES

_FOLDER = "engines"
NAME_LENGTH = 16
EMPTY = "no engine of this bundle was built here yet"


@dataclass(frozen=True)
class Gpu:
    """The first GPU: model name, compute capability such as `sm_90`, memory in bytes."""

    name: str
    architecture: str
    memory: int


class Profile(StrictModel):
    """The batch sizes of a profile, which is tuned for the largest."""

    minimum: Count
    maximum: Count

    def __str__(self) -> str:
        return (
            f"{self.minimum}"
            if self.minimum == self.maximum
            else f"{self.minimum}-{self.maximum}"
        )


def parse_profiles(text: str | None, batch: BatchRange) -> tuple[Profile, ...]:
    """Parse `1,8,32` to one TensorRT profile per size; without *text*, use the sizes of *batch*.

    Each profile covers the batches from the previous size plus one up to its size. Raises
    `ConfigError` if a size is not a number or outside the range that the bundle was verified
    for.
    """
    # Parse the sizes.
    try:
        unsorted = (
            (batch.minimum, batch.optimum, batch.maximum) if text is None else text.split(",")
        )
        sizes = sorted(set(map(int, unsorted)))
    except ValueError as error:
        raise ConfigError(
            "write batch sizes such as 1,8,32", setting="profiles", value=text
        ) from error

    if sizes[0] < batch.minimum or sizes[-1] > batch.maximum:
        raise ConfigError(
            f"the bundle was verified for batches of {batch.minimum} to {batch.maximum}; choose from these",
            setting="profiles",
            value=text,
        )

    # Each profile begins after the size before.
    starts = [batch.minimum, *(size + 1 for size in sizes[:-1])]
    return tuple(
        Profile(minimum=start, maximum=size) for start, size in zip(starts, sizes, strict=True)
    )


def profile_index(profiles: Sequence[Profile], batch: int) -> int:
    """Return the index of the profile for *batch* images; raise `ConfigError` if there is none."""
    for index, profile in enumerate(profiles):
        if profile.minimum <= batch <= profile.maximum:
            return index
    accepted = ", ".join(map(str, profiles))
    raise ConfigError(f"no profile accepts {batch} images; send batches of {accepted} images")


class EngineKey(StrictModel):
    """Cache key of a plan: bundle, TensorRT version, GPU, precision, profiles and converter."""

    bundle: str  # <model>-<id>
    bundle_onnx: Sha256
    tensorrt: str
    gpu: str
    architecture: Annotated[str, matching(r"sm_[0-9]+", "a GPU architecture such as sm_90")]
    precision: str
    profiles: Annotated[tuple[Profile, ...], pydantic.Field(min_length=1)]
    via: Literal["onnx", "torch-tensorrt"] = "onnx"  # TensorRT's ONNX parser, or torch-tensorrt
    # Increased when `cast_images_first` or the flags of the builder change what a plan computes.
    builder: Literal[1] = 1

    @property
    def name(self) -> str:
        """File name of the plan without suffix: a hash over the key."""
        return hashlib.sha256(to_json(self.model_dump(mode="json"))).hexdigest()[:NAME_LENGTH]

    @property
    def largest_batch(self) -> int:
        """Largest batch of all profiles."""
        return max(profile.maximum for profile in self.profiles)


class EngineRecord(StrictModel):
    """Content of `<name>.json`.

    `accepted_errors` has the numerical error that the engine may have, by output, if it exceeds
    the tolerance of the bundle and the user allowed it. `replays` has what was measured.
    """

    format: Literal["sopdeploy-engine"] = "sopdeploy-engine"
    version: Literal[1] = 1
    key: EngineKey
    plan_sha256: Sha256
    plan_bytes: Count
    build_seconds: NonNegative
    replays: tuple[Replay, ...]
    accepted_errors: Annotated[
        dict[str, NonNegative], pydantic.Field(exclude_if=lambda errors: not errors)
    ] = pydantic.Field(default_factory=dict)


class StoredEngine(NamedTuple):
    """A cached plan whose key and hash were verified, and its record."""

    plan: bytes
    record: EngineRecord


def key_fields(bundle: Bundle, tensorrt: str, gpu: Gpu) -> dict[str, str]:
    """Return the fields of an engine's key that *bundle* and the machine decide."""
    return {
        "bundle": bundle.name,
        "bundle_onnx": _graph_sha256(bundle),
        "tensorrt": tensorrt,
        "gpu": gpu.name,
        "architecture": gpu.architecture,
        "precision": bundle.manifest.precision,
    }


def _graph_sha256(bundle: Bundle) -> str:
    """Return the sha256 of `model.onnx`; if its weights are in another file, of the hashes of both."""
    hashes = [file.sha256 for file in bundle.manifest.graph_files.values()]
    return (
        hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    )


def cache_folder(bundle: Bundle, folder: Path | None = None) -> Path:
    """Return the cache folder of *bundle*, in *folder* or beside the bundle."""
    parent = folder if folder is not None else bundle.path.resolve().parent / _FOLDER
    return parent / bundle.name


def store_engine(folder: Path, plan: bytes, record: EngineRecord) -> Path:
    """Write *plan* and then its *record*, each atomically; return the path of the plan.

    Several processes may write the same engine. Raises `StorageError` if *folder* cannot be
    written.
    """
    path = folder / f"{record.key.name}.plan"

    contents = {path: plan, path.with_suffix(".json"): to_json(record.model_dump(mode="json"))}
    for file, content in contents.items():
        with writing(file):
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as partial:
                partial.write_bytes(content)
    return path


def load_engine(folder: Path, fields: Mapping[str, Any]) -> StoredEngine | str:
    """Load the engine in *folder* with the largest batch size whose key has *fields*, and verify its hash.

    *fields* are those of `key_fields`, or all of a key. Returns the reason if there is none.
    """
    records = read_records(folder)
    if not records:
        return EMPTY

    # Find the engines that can be used; without one, tell what the nearest one was built for.
    all_differences = [_describe_differences(record.key, fields) for record in records]
    usable = [
        record
        for record, differences in zip(records, all_differences, strict=True)
        if not differences
    ]

    if not usable:
        nearest = min(all_differences, key=len)
        return f"the nearest engine here was built for {'; '.join(nearest)}"

    # Read the one with the largest batch, unless it was damaged.
    best = max(usable, key=lambda record: (record.key.largest_batch, record.key.name))
    path = folder / f"{best.key.name}.plan"
    if not path.is_file():
        return f"{path.name} is missing"

    try:
        plan = read_file(path, MAX_WEIGHTS_BYTES)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"

    if hashlib.sha256(plan).hexdigest() != best.plan_sha256:
        return f"{path.name} does not have the sha256 of its record: it was damaged or replaced"
    return StoredEngine(plan, best)


def _describe_differences(key: EngineKey, wanted: Mapping[str, Any]) -> list[str]:
    """Describe each field of *key* that is not as *wanted*, such as "architecture sm_80, not sm_90"."""
    texts = []
    for field, expected in wanted.items():
        actual = getattr(key, field)
        if actual == expected:
            continue

        if field == "profiles":  # as 1,2-8
            actual, expected = (",".join(map(str, profiles)) for profiles in (actual, expected))

        end = NAME_LENGTH if field == "bundle_onnx" else None  # only this hash is shown in part
        texts.append(
            f"{field.replace('_', ' ')} {str(actual)[:end]}, not {str(expected)[:end]}"
        )
    return texts


def read_records(folder: Path) -> list[EngineRecord]:
    """Read the valid records of engines in *folder* that have the name of their key, sorted by file name."""
    records = []

    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError):
            record = EngineRecord.model_validate_json(read_file(path, MAX_TEXT_BYTES))
            if record.key.name == path.stem:
                records.append(record)
    return records
