"""What is written beside a plan: the key it was built for, its hash, and what was measured on it.

The key says everything that makes a plan fit or not fit; two keys differ in named fields, so that a rebuild
can say why.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

import pydantic

from sopdeploy.bundle.manifest import Sha256, to_json
from sopdeploy.config import StrictModel
from sopdeploy.tensorrt.profiles import Profile

NAME_LENGTH = 16
Via = Literal["onnx", "torch-tensorrt"]

FIELD_NAMES = {
    "bundle": "bundle",
    "bundle_onnx": "graph",
    "tensorrt": "TensorRT",
    "gpu": "GPU",
    "architecture": "GPU architecture",
    "precision": "precision",
    "profiles": "profiles",
    "level": "optimisation level",
    "via": "way to the plan:",
    "builder": "version of the engine builder",
}


class EngineKey(StrictModel):
    """Everything that decides whether a plan fits: bundle, TensorRT, GPU, precision, profiles."""

    bundle: str  # <model>-<id>
    bundle_onnx: Sha256
    tensorrt: str
    gpu: str
    architecture: Annotated[str, pydantic.Field(pattern=r"^sm_\d+$")]
    precision: str
    profiles: Annotated[tuple[Profile, ...], pydantic.Field(min_length=1)]
    level: Annotated[int, pydantic.Field(ge=0, le=5)] = 3
    via: Via = "onnx"
    builder: Literal[1] = 1  # raised where the lint or the builder's flags change what a plan computes

    @pydantic.model_serializer(mode="wrap")
    def _without_the_usual_way(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `via` out where it is ONNX, so that such an engine keeps the name it always had."""
        fields: dict[str, Any] = dump(self)
        return {name: value for name, value in fields.items() if (name, value) != ("via", "onnx")}

    @property
    def name(self) -> str:
        """Return the name of the plan's files: a hash over the key."""
        return hashlib.sha256(to_json(self.model_dump(mode="json"))).hexdigest()[:NAME_LENGTH]

    @property
    def largest_batch(self) -> int:
        """Return the largest batch that any profile takes."""
        return max(profile.maximum for profile in self.profiles)

    def differences(self, other: "EngineKey") -> list[str]:
        """Return in words where *other* is not this key."""
        return [
            f"{FIELD_NAMES[field]} {said(getattr(other, field))}, not {said(getattr(self, field))}"
            for field in FIELD_NAMES
            if getattr(self, field) != getattr(other, field)
        ]


def said(value: Any) -> str:
    """Return a key's field as a person reads it; a hash is shortened."""
    if isinstance(value, tuple):
        return ",".join(str(profile) for profile in value)
    text = str(value)
    return text[:NAME_LENGTH] if len(text) == hashlib.sha256().digest_size * 2 else text


class PartPrecision(StrictModel):
    """Of one part of the network: the precisions its graph asks for, and those of the engine's layers."""

    asked: tuple[str, ...]
    realised: dict[str, int]


class Receipt(StrictModel):
    """The precision receipt: what was asked and what the engine's inspector shows, part by part."""

    asked: str
    parts: dict[str, PartPrecision]
    layers: int
    operators: int
    operators_seen: int


class ProbeReplay(StrictModel):
    """The largest deviation per output when the probes ran on the engine in batches of *batch*."""

    batch: int
    images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]


class Hazard(StrictModel):
    """One thing that this TensorRT would have read wrongly, and what was done to the graph."""

    rule: str
    operators: int
    done: str


class EngineRecord(StrictModel):
    """What `<name>.json` holds."""

    format: Literal["sopdeploy-engine"] = "sopdeploy-engine"
    version: Literal[1] = 1
    key: EngineKey
    plan_sha256: Sha256
    plan_bytes: Annotated[int, pydantic.Field(ge=1)]
    parsed_onnx_sha256: Sha256  # of the graph after the lint; by torch-tensorrt of network.pt2
    build_seconds: Annotated[float, pydantic.Field(ge=0)]
    hazards: tuple[Hazard, ...]
    receipt: Receipt
    replays: tuple[ProbeReplay, ...]

    def to_bytes(self) -> bytes:
        """Return the bytes of the JSON file."""
        return to_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, raw: bytes) -> "EngineRecord":
        """Return the record in *raw*; raises `ValueError` (pydantic's is one) where it is none."""
        return cls.model_validate_json(json.dumps(json.loads(raw)))
