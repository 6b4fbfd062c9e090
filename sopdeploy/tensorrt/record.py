"""Engine records: JSON files beside plans with the cache key, the plan's hash and measurements.

The key contains everything that decides whether a plan can be used. Keys are compared field by field, so a
rebuild can state its reason.
"""

import hashlib
from typing import Annotated, Literal

import pydantic

from sopdeploy.bundle.manifest import Sha256, to_json
from sopdeploy.config import Count, NonNegative, StrictModel
from sopdeploy.tensorrt.profiles import Profile

NAME_LENGTH = 16

FIELD_NAMES = {
    "bundle": "bundle",
    "bundle_onnx": "graph",
    "tensorrt": "TensorRT",
    "gpu": "GPU",
    "architecture": "GPU architecture",
    "precision": "precision",
    "profiles": "profiles",
    "level": "optimization level",
    "builder": "engine builder version",
}


class EngineKey(StrictModel):
    """Cache key of a plan: bundle, TensorRT version, GPU, precision, profiles and builder options."""

    bundle: str  # <model>-<id>
    bundle_onnx: Sha256
    tensorrt: str
    gpu: str
    architecture: Annotated[str, pydantic.Field(pattern=r"^sm_\d+$")]
    precision: str
    profiles: Annotated[tuple[Profile, ...], pydantic.Field(min_length=1)]
    level: Annotated[int, pydantic.Field(ge=0, le=5)] = 3
    builder: Literal[1] = 1  # increased when the lint or the builder flags change what a plan computes

    @property
    def name(self) -> str:
        """File name of the plan without suffix: a hash over the key."""
        return hashlib.sha256(to_json(self.model_dump(mode="json"))).hexdigest()[:NAME_LENGTH]

    @property
    def largest_batch(self) -> int:
        """Largest batch of all profiles."""
        return max(profile.maximum for profile in self.profiles)

    def differences(self, other: "EngineKey") -> list[str]:
        """Describe each field in which *other* differs from this key; hashes are shortened."""
        found = []
        for field, name in FIELD_NAMES.items():
            values = [getattr(key, field) for key in (other, self)]
            if values[0] != values[1]:
                texts = [",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
                length = NAME_LENGTH if field == "bundle_onnx" else None
                found.append(f"{name} {texts[0][:length]}, not {texts[1][:length]}")
        return found


class PartPrecision(StrictModel):
    """Precisions of a network part: requested by the graph, and the number of engine layers by precision."""

    requested: tuple[str, ...]
    actual: dict[str, int]


class Receipt(StrictModel):
    """Requested and actual precision of the engine's layers per network part, from TensorRT's inspector.

    `operators` counts the operators of the graph, `operators_seen` those that the inspector names. `warnings`
    says where the precisions differ or the inspector shows too little.
    """

    requested: str
    parts: dict[str, PartPrecision]
    layers: int
    operators: int
    operators_seen: int
    warnings: tuple[str, ...] = ()


class ProbeReplay(StrictModel):
    """Largest deviation per output when the engine ran the probes in batches of `batch`."""

    batch: int
    images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]


class Hazard(StrictModel):
    """A pattern that this TensorRT version would compute incorrectly, and how the graph was changed."""

    rule: str
    operators: int
    done: str


class EngineRecord(StrictModel):
    """Content of `<name>.json`; `parsed_onnx_sha256` is the hash of the builder's input."""

    format: Literal["sopdeploy-engine"] = "sopdeploy-engine"
    version: Literal[1] = 1
    key: EngineKey
    plan_sha256: Sha256
    plan_bytes: Count
    parsed_onnx_sha256: Sha256
    build_seconds: NonNegative
    hazards: tuple[Hazard, ...]
    receipt: Receipt
    replays: tuple[ProbeReplay, ...]

    def to_bytes(self) -> bytes:
        """Serialize to JSON."""
        return to_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, raw: bytes) -> "EngineRecord":
        """Parse the JSON in *raw*; raise `ValueError` if it is not a valid record."""
        return cls.model_validate_json(raw)
