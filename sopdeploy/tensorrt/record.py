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


class EngineKey(StrictModel):
    """Cache key of a plan: bundle, TensorRT version, GPU, precision, profiles and converter."""

    bundle: str  # <model>-<id>
    bundle_onnx: Sha256
    tensorrt: str
    gpu: str
    architecture: Annotated[str, pydantic.Field(pattern=r"^sm_\d+$")]
    precision: str
    profiles: Annotated[tuple[Profile, ...], pydantic.Field(min_length=1)]
    via: Literal["onnx", "torch-tensorrt"] = "onnx"  # TensorRT's ONNX parser, or torch-tensorrt
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
        texts = []
        for field in EngineKey.model_fields:
            theirs, own = getattr(other, field), getattr(self, field)
            if field == "profiles":
                theirs, own = (",".join(map(str, profiles)) for profiles in (theirs, own))
            if theirs != own:
                length = NAME_LENGTH if field == "bundle_onnx" else None
                texts.append(f"{field.replace('_', ' ')} {str(theirs)[:length]}, not {str(own)[:length]}")
        return texts


class Receipt(StrictModel):
    """The number of layers with each floating type at inputs or outputs, from TensorRT's inspector.

    `warnings` says where these types differ from those of the graph, or that the inspector shows none.
    """

    layers: dict[str, int]
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
    """Content of `<name>.json`; `source_sha256` is the hash of the builder's input."""

    format: Literal["sopdeploy-engine"] = "sopdeploy-engine"
    version: Literal[1] = 1
    key: EngineKey
    plan_sha256: Sha256
    plan_bytes: Count
    source_sha256: Sha256
    build_seconds: NonNegative
    hazards: tuple[Hazard, ...]
    receipt: Receipt
    replays: tuple[ProbeReplay, ...]
