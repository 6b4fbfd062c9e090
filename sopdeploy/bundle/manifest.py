"""The manifest: what a bundle holds and how it came to be. No torch here."""

import hashlib
import json
from typing import Annotated, Any, Literal

import pydantic

from sopdeploy.config import StrictModel, first_problem
from sopdeploy.images.preprocess import Preprocess

ID_LENGTH = 12

Precision = Literal["fp32", "fp16", "bf16-backbone", "int8"]
Int8For = Literal["cpu", "tensorrt"]
Sha256 = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(StrictModel):
    """Size in bytes and sha256 of one file of the bundle."""

    bytes: Annotated[int, pydantic.Field(ge=0)]
    sha256: Sha256


class TensorRecord(StrictModel):
    """One tensor of the graph's border; a `None` dimension is the batch."""

    name: str
    dtype: Literal["uint8", "float32", "int64"]
    shape: Annotated[tuple[int | None, ...], pydantic.Field(min_length=1)]


class BatchRange(StrictModel):
    """Batch sizes the graph was verified for."""

    minimum: Annotated[int, pydantic.Field(ge=1)] = 1
    optimum: Annotated[int, pydantic.Field(ge=1)] = 8
    maximum: Annotated[int, pydantic.Field(ge=1)] = 64

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "BatchRange":
        if not self.minimum <= self.optimum <= self.maximum:
            raise ValueError("batch sizes must satisfy minimum <= optimum <= maximum")
        return self


class Lineage(StrictModel):
    """Hash chain from the checkpoint to the graph that ships."""

    checkpoint_sha256: Sha256
    program_root: Sha256
    onnx_root: Sha256


class Manifest(StrictModel):
    """What `manifest.json` holds; `int8_for`, the runtime int8 was placed for, only where there is int8."""

    format: Literal["sopdeploy-bundle"] = "sopdeploy-bundle"
    version: Literal[1] = 1
    model: Annotated[str, pydantic.Field(pattern=r"^([a-z-]+:)?[A-Za-z0-9._-]+$")]
    config: dict[str, Any]
    inputs: Annotated[tuple[TensorRecord, ...], pydantic.Field(min_length=1)]
    outputs: Annotated[tuple[TensorRecord, ...], pydantic.Field(min_length=1)]
    preprocess: Preprocess
    precision: Precision = "fp32"
    int8_for: Int8For | None = None
    batch: BatchRange
    opset: int
    detached: tuple[str, ...]
    lineage: Lineage
    versions: dict[str, str]
    files: dict[str, FileRecord]

    @pydantic.model_serializer(mode="wrap")
    def _without_what_is_not_there(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        return fields if self.int8_for else {key: fields[key] for key in fields if key != "int8_for"}

    @property
    def id(self) -> str:
        """Return the bundle's id: a hash over the manifest, and through it over every file."""
        return hashlib.sha256(to_json(self.model_dump(mode="json"))).hexdigest()[:ID_LENGTH]

    def to_bytes(self) -> bytes:
        """Return the bytes of `manifest.json`; there is exactly one rendering of a manifest."""
        return to_json({"id": self.id, **self.model_dump(mode="json")})

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Manifest":
        """Return the manifest that *raw* renders.

        Raises `ValueError` where *raw* is not JSON, has another schema, or is not, byte for byte,
        the rendering of the manifest it holds: then it was edited or damaged.
        """
        fields = json.loads(raw)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        fields.pop("id", None)
        try:
            manifest = cls.model_validate_json(json.dumps(fields))
        except pydantic.ValidationError as problem:
            raise ValueError(first_problem(problem)) from problem
        if manifest.to_bytes() != raw:
            raise ValueError("was edited or damaged after the export")
        return manifest

    @property
    def name(self) -> str:
        """Return `<model>-<id>`, the name of the bundle's folder; `timm:resnet18` becomes `timm-resnet18`."""
        return f"{self.model.replace(':', '-')}-{self.id}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (height, width, 3) of one input image."""
        return (self.preprocess.crop, self.preprocess.crop, 3)


def to_json(value: Any) -> bytes:
    """Return *value* as the JSON bytes every file of a bundle is written in."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
