"""Metadata, configuration and statistics of models in the form that Triton clients read.

Statistics come from the metrics of the server. Counters are those of all versions of a model since its
processes started: a reload keeps them.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.inference.model import Model
from sopdeploy_service.settings import Settings

DATATYPES = {"uint8": "UINT8", "float32": "FP32"}  # of the input and of the outputs of every bundle
CONFIG_TYPES = {"UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics")
# Of Triton: of `sopdeploy_inference_seconds`. Writing the response is not measured.
PARTS = {
    "success": "success",
    "fail": "fail",
    "queue": "queue",
    "compute_input": "decode",
    "compute_infer": "infer",
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a model; the first dimension of *shape* is the batch, -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def expected_shape(self) -> str:
        """The shape for error messages: `[n, 224, 224, 3]`."""
        return "[" + ", ".join(["n", *map(str, self.shape[1:])]) + "]"


IMAGE = Tensor("IMAGE", "BYTES", (-1, 1))


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors of a model, and the largest number of images in a request.

    A request gives one of two inputs: *tensor* or `IMAGE`.
    """

    tensor: Tensor
    outputs: tuple[Tensor, ...]
    max_images: int


def signature_of(bundle: Bundle, max_images: int) -> Signature:
    """Create the signature of *bundle* for requests of at most *max_images*."""
    manifest = bundle.manifest
    tensor, *outputs = (
        Tensor(record.name, DATATYPES[record.dtype], tuple(-1 if n is None else n for n in record.shape))
        for record in (manifest.inputs[0], *manifest.outputs)
    )
    return Signature(tensor, tuple(outputs), max_images)


def platform(model: Model) -> str:
    """Return Triton's name of the runtime of *model*."""
    engine = model.loaded.runtime.name.startswith("tensorrt ")  # the version follows
    return "tensorrt_plan" if engine else "onnxruntime_onnx"


def model_metadata(model: Model) -> dict[str, Any]:
    """Build the response of `GET /v2/models/{name}`."""
    signature = signature_of(model.bundle, 1)
    groups = {"inputs": (signature.tensor, IMAGE), "outputs": signature.outputs}
    tensors = {
        group: [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            for tensor in members
        ]
        for group, members in groups.items()
    }
    return {"name": model.name, "versions": [model.version], "platform": platform(model), **tensors}


def model_config(model: Model, settings: Settings) -> dict[str, Any]:
    """Build a Triton model configuration; dimensions are without the batch.

    Both inputs are optional: a request gives one of them.
    """
    signature = signature_of(model.bundle, settings.max_images)

    def describe(tensor: Tensor) -> dict[str, Any]:
        dims = list(tensor.shape[1:])
        return {"name": tensor.name, "data_type": CONFIG_TYPES[tensor.datatype], "dims": dims}

    kinds = {"cpu": "KIND_CPU", "none": "KIND_AUTO"}  # none: not loaded
    return {
        "name": model.name,
        "platform": platform(model),
        "backend": platform(model).partition("_")[0],
        "max_batch_size": signature.max_images,
        "input": [
            {**describe(signature.tensor), "format": "FORMAT_NHWC", "optional": True},
            {**describe(IMAGE), "format": "FORMAT_NONE", "optional": True},
        ],
        "output": [describe(tensor) for tensor in signature.outputs],
        "dynamic_batching": {"max_queue_delay_microseconds": round(settings.max_queue_delay_ms * 1000)},
        "instance_group": [{"count": 1, "kind": kinds.get(model.loaded.runtime.device, "KIND_GPU")}],
    }


def model_statistics(page: bytes, models: Iterable[Model]) -> dict[str, Any]:
    """Build the response of `GET /v2/models/{name}/stats` from the metrics *page* of all processes.

    Durations are sums over requests in nanoseconds; `last_inference` is in milliseconds since 1970.
    """
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)  # of each process
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = sample.labels
            values[sample.name, labels.get("model", ""), labels.get("part", "")].append(sample.value)

    def of(model: Model, name: str, part: str = "") -> list[float]:
        return values[f"sopdeploy_{name}", model.name, part] or [0.0]

    return {
        "model_stats": [
            {
                "name": model.name,
                "version": model.version,
                "last_inference": round(1e3 * max(of(model, "last_inference_timestamp_seconds"))),
                "inference_count": round(sum(of(model, "batch_size_sum"))),
                "execution_count": round(sum(of(model, "batch_size_count"))),
                "inference_stats": {
                    name: {
                        "count": round(sum(of(model, "inference_seconds_count", part))),
                        "ns": round(1e9 * sum(of(model, "inference_seconds_sum", part))),
                    }
                    for name, part in PARTS.items()
                },
                "batch_stats": [],
            }
            for model in models
        ]
    }
