"""The bundle manifest: contents, inputs and outputs, and origin. Does not import torch."""

import hashlib
import json
from typing import Annotated, Any, Literal

import pydantic

from sopdeploy.base.config import (
    FieldValues,
    Positive,
    StrictModel,
    Text,
    check_is_readable,
    matching,
    parse_json,
    validate_format,
    writer_of,
)
from sopdeploy.base.files import GRAPH, GRAPH_DATA
from sopdeploy.base.names import ProjectName
from sopdeploy.base.project import Origin, Time
from sopdeploy.bundle.decision import Decision
from sopdeploy.images.preprocess import Preprocess

FORMAT_VERSION: Literal[1] = 1
ID_LENGTH = 12
CERTIFICATE = "certificate.json"
LOGITS = "logits"  # (C,): the first output
GATES = "gates"  # (N,): the weights of the components of a mixture
# (D,): the vector that the last linear layer receives, for requests that need it; `export
# --with-features`
EMBEDDING = "embedding"

Precision = Literal["fp32", "fp16", "int8"]
Int8For = Literal["cpu", "tensorrt"]
ProofKind = Literal[
    "three-way",
    "trained-detached-rebuilt",
    "trained-detached",
    "trained-plain",
    "trained-rebuilt",
    "trained-only",
]
# The networks that each kind compares
PROOFS: dict[ProofKind, tuple[str, ...]] = {
    "three-way": ("trained", "detached", "plain"),
    "trained-detached-rebuilt": ("trained", "detached", "rebuilt"),
    "trained-detached": ("trained", "detached"),
    "trained-plain": ("trained", "plain"),
    "trained-rebuilt": ("trained", "rebuilt"),
    "trained-only": ("trained",),
}
MAX_TENSORS = 100  # inputs or outputs of a graph
MAX_ENTRIES = 10_000  # files, versions, modules
Entries = Annotated[tuple[Text, ...], pydantic.Field(max_length=MAX_ENTRIES)]
Sha256 = Annotated[str, matching(r"[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits")]


class FileRecord(StrictModel):
    """Size in bytes and sha256 of one bundle file."""

    bytes: Annotated[int, pydantic.Field(ge=0)]
    sha256: Sha256


class TensorRecord(StrictModel):
    """An input or output of the graph; a `None` dimension is the batch size."""

    name: Text
    dtype: Literal["uint8", "float32", "int64"]
    shape: Annotated[
        tuple[int | None, ...], pydantic.Field(min_length=1, max_length=MAX_TENSORS)
    ]


class BatchRange(StrictModel):
    """Batch sizes that the graph accepts; the export compared its outputs for some of them."""

    minimum: Annotated[int, pydantic.Field(ge=1)] = 1
    optimum: Annotated[int, pydantic.Field(ge=1)] = 8
    maximum: Annotated[int, pydantic.Field(ge=1)] = 64

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "BatchRange":
        if not self.minimum <= self.optimum <= self.maximum:
            raise ValueError("batch sizes must satisfy minimum <= optimum <= maximum")
        return self


class Lineage(StrictModel):
    """Hashes of the checkpoint, of the captured program and of the exported graph."""

    checkpoint_sha256: Sha256
    program_root: Sha256
    onnx_root: Sha256


class ScaledTensor(StrictModel):
    """A tensor of the classifier, with the sha256 of its content before and after the division."""

    name: Text
    before: Sha256
    after: Sha256


class TemperatureScaling(StrictModel):
    """The division of the classifier, and so of the logits, by a temperature (Guo et al., ICML 2017)."""

    temperature: Positive
    tensors: Annotated[
        tuple[ScaledTensor, ...], pydantic.Field(min_length=1, max_length=MAX_TENSORS)
    ]


class PixelComparison(StrictModel):
    """How the server's pixels compare with those of a training, whose *transform* it names.

    `largest_difference` is that of the photos of the export, in levels of 255, and `num_changed` how many of
    `num_images` get another class. `differences` were accepted; without any, only rounding differs.
    """

    transform: Text
    num_images: Annotated[int, pydantic.Field(ge=0)]
    num_changed: Annotated[int, pydantic.Field(ge=0)]
    largest_difference: Annotated[float, pydantic.Field(ge=0, le=255)]
    differences: Annotated[tuple[Text, ...], pydantic.Field(max_length=MAX_ENTRIES)] = ()

    def describe_classes(self) -> str:
        """Say how many images get another class."""
        if self.num_changed == 0:
            return "no class changes"
        return f"{self.num_changed} of {self.num_images} photos get another class"

    def describe(self) -> str:
        """Say whether the pixels are those of the training, and how many classes change."""
        if self.differences:
            return (
                f"other pixels than {self.transform}, which was accepted: it {'; it '.join(self.differences)} "
                f"({self.describe_classes()})"
            )
        largest = f"largest difference {self.largest_difference:.2g} of 255"
        return (
            f"photos give the pixels of {self.transform} ({largest}, {self.describe_classes()})"
        )


OptionalPixels = Annotated[
    PixelComparison | None, pydantic.Field(exclude_if=lambda pixels: pixels is None)
]
# Missing in files of versions before 0.4.0, which divided the classifier, too.
OptionalScaling = Annotated[
    TemperatureScaling | None, pydantic.Field(exclude_if=lambda scaling: scaling is None)
]


class Manifest(StrictModel):
    """Content of `manifest.json`.

    `project` is the name under which the network is served, and `model` the network.
    `exported_at` is the time of the export by the clock of its machine; it is not part of the
    id. `origin` is None for a network that `train` did not train. `int8_for` is the runtime of
    an int8 graph, and `decision` says how logits become a decision. `temperature_scaling` says
    by which temperature the classifier was divided; None if it was not. `pixels` compares the rules
    `preprocess` with the transform of the training; None if it was not given. `mixes_images` names the
    outputs that changed with the other images of a batch; before version 0.3.0, the operators
    through which an output may depend on them.
    """

    format: Literal["sopdeploy-bundle"] = "sopdeploy-bundle"
    version: Literal[1] = FORMAT_VERSION
    project: ProjectName
    exported_at: Time
    origin: Origin | None = None
    model: Annotated[Text, matching(r"([a-z-]+:){0,2}[A-Za-z0-9._-]+", "the name of a network")]
    config: FieldValues
    inputs: Annotated[
        tuple[TensorRecord, ...], pydantic.Field(min_length=1, max_length=MAX_TENSORS)
    ]
    outputs: Annotated[
        tuple[TensorRecord, ...], pydantic.Field(min_length=1, max_length=MAX_TENSORS)
    ]
    preprocess: Preprocess
    precision: Precision = "fp32"
    int8_for: Int8For | None = None
    decision: Decision | None = None
    temperature_scaling: OptionalScaling = None
    pixels: OptionalPixels = None
    batch: BatchRange
    mixes_images: Entries = ()
    opset: int
    detached: Entries
    lineage: Lineage
    versions: Annotated[dict[Text, Text], pydantic.Field(max_length=MAX_ENTRIES)]
    files: Annotated[dict[Text, FileRecord], pydantic.Field(max_length=MAX_ENTRIES)]

    @pydantic.model_validator(mode="after")
    def _check_temperature(self) -> "Manifest":
        scaling = self.temperature_scaling
        if scaling is None:
            return self
        if self.rules.divides_logits:
            raise ValueError("temperature_scaling: the decision divides the logits again")
        if self.rules.temperature != scaling.temperature:
            raise ValueError(
                f"temperature_scaling: the decision has the temperature {self.rules.temperature}, "
                f"not {scaling.temperature}"
            )
        return self

    @property
    def id(self) -> str:
        """Bundle id: a hash over the manifest without the time; it contains the hashes of all files."""
        fields = self.model_dump(mode="json", exclude_unset=True)
        del fields["exported_at"]
        return hashlib.sha256(to_json(fields)).hexdigest()[:ID_LENGTH]

    def has_content_of(self, other: "Manifest") -> bool:
        """Tell whether both describe the same bundle, maybe exported at another time.

        Equal ids do not show this: whoever makes two bundles can give them the same 12 digits.
        """
        return self.model_copy(update={"exported_at": other.exported_at}) == other

    @property
    def contents_sha256(self) -> str:
        """The sha256 of all fields but the time, without the file that holds it: the certificate."""
        fields = self.model_dump(mode="json", exclude_unset=True)
        del fields["exported_at"]
        fields["files"].pop(CERTIFICATE, None)
        return hashlib.sha256(to_json(fields)).hexdigest()

    def to_bytes(self) -> bytes:
        """Serialize to `manifest.json`, with a hash of all fields; there is exactly one serialization.

        Fields that were not given are left out. A file of an earlier version, which lacks newer
        fields, therefore keeps its bytes and its id.
        """
        fields = self.model_dump(mode="json", exclude_unset=True)
        return to_json(
            {"id": self.id, "sha256": hashlib.sha256(to_json(fields)).hexdigest(), **fields}
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Manifest":
        """Parse a manifest file.

        Raises `ValueError` if *raw* is not JSON, is of another version, has another schema, or
        differs by any byte from `to_bytes`.
        """
        fields = parse_json(raw)

        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")

        # `to_bytes` computes these two anew; the comparison below includes them.
        for name in ("id", "sha256"):
            fields.pop(name, None)

        check_is_readable(writer_of(fields), "export the bundle again")
        manifest = validate_format(cls, fields)
        if manifest.to_bytes() != raw:
            raise ValueError("was edited or damaged after the export")
        return manifest

    def with_written_defaults(self) -> "Manifest":
        """Copy the manifest with its default values as given ones, so that they are written."""
        fields = self.model_dump(mode="json")
        if self.origin is not None:
            fields["origin"] = self.origin.written_fields()
        return Manifest.model_validate(fields)

    @property
    def rules(self) -> Decision:
        """Rules that turn logits into classes; without `decision`, the most probable classes."""
        return self.decision or Decision()

    @property
    def graph_files(self) -> dict[str, FileRecord]:
        """The records of the file of the graph and, if it has one, of the file of its weights."""
        return {name: self.files[name] for name in (GRAPH, GRAPH_DATA) if name in self.files}

    @property
    def name(self) -> str:
        """Folder name of the bundle: `<project>-<id>`."""
        return f"{self.project}-{self.id}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one input image: (height, width, 3)."""
        return (self.preprocess.crop, self.preprocess.crop, 3)


def to_json(value: Any) -> bytes:
    """Serialize *value* in the JSON style of all bundle files."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def describe_temperature(decision: Decision | None, scaling: TemperatureScaling | None) -> str:
    """Say whether the logits of a bundle are divided by the temperature; "" if there is none."""
    if decision is None or decision.calibration is None or decision.temperature == 1:
        return ""
    temperature = f"{decision.temperature:.4g}"
    fitted = f"the temperature {temperature}, fitted on {decision.calibration.images}"
    if decision.divides_logits:
        return f"as trained; divide them by {fitted}, before the softmax or sigmoid"

    tensors = (
        "" if scaling is None else f" ({', '.join(each.name for each in scaling.tensors)})"
    )
    return (
        f"the classifier{tensors} was divided by {fitted}; multiply the logits by {temperature} to get "
        "the logits of the trained network"
    )
