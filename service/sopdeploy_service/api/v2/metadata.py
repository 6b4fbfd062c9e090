"""What the protocol tells of the server and its models, in the shapes that Triton's clients read."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import TensorRecord
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_statistics import Sum
from sopdeploy_service.settings import Settings

DATATYPES = {"uint8": "UINT8", "float32": "FP32", "int64": "INT64"}
DTYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype("u1"),
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the model's border; the first dimension of *shape* is the batch, -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, record: TensorRecord) -> "Tensor":
        """Return the tensor that *record* of a manifest describes."""
        sizes = (-1 if size is None else size for size in record.shape)
        return cls(record.name, DATATYPES[record.dtype], tuple(sizes))

    @property
    def item(self) -> tuple[int, ...]:
        """Return the shape of one item of the batch."""
        return self.shape[1:]

    @property
    def wanted(self) -> str:
        """Return the shape for people, `[n, 224, 224, 3]`."""
        return "[" + ", ".join(["n", *map(str, self.item)]) + "]"


IMAGE = Tensor("IMAGE", "BYTES", (-1, 1))


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors of one model, the labels of its first output, and how many images a request may have."""

    tensor: Tensor
    outputs: tuple[Tensor, ...]
    labels: tuple[str, ...]
    max_images: int

    @classmethod
    def of(cls, bundle: Bundle, max_images: int) -> "Signature":
        """Return the signature of *bundle*."""
        manifest = bundle.manifest
        return cls(
            Tensor.of(manifest.inputs[0]),
            tuple(Tensor.of(output) for output in manifest.outputs),
            bundle.labels,
            max_images,
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return the two inputs of which a request fills one."""
        return (self.tensor, IMAGE)


EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics")
CONFIG_TYPES = {"UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32", "INT64": "TYPE_INT64", "BYTES": "TYPE_STRING"}


def server_metadata() -> dict[str, Any]:
    """Return what `GET /v2` says."""
    return {"name": "sopdeploy", "version": version("sopdeploy"), "extensions": list(EXTENSIONS)}


def model_metadata(model: Model, versions: Iterable[str], signature: Signature) -> dict[str, Any]:
    """Return what `GET /v2/models/{name}` says; a request fills one of the two inputs."""
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": platform(model),
        "inputs": [described(tensor) for tensor in signature.inputs],
        "outputs": [described(tensor) for tensor in signature.outputs],
    }


def described(tensor: Tensor) -> dict[str, Any]:
    """Return the metadata of *tensor*."""
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def platform(model: Model) -> str:
    """Return Triton's word for what runs *model*."""
    return "tensorrt_plan" if model.loaded.runtime.name == "tensorrt" else "onnxruntime_onnx"


def model_config(model: Model, signature: Signature, settings: Settings) -> dict[str, Any]:
    """Return the model as a Triton configuration would have it; dimensions are without the batch."""
    delay = round(settings.max_queue_delay_ms * 1000)
    kind = "KIND_CPU" if model.loaded.runtime.device == "cpu" else "KIND_GPU"
    return {
        "name": model.name,
        "platform": platform(model),
        "backend": platform(model).partition("_")[0],
        "max_batch_size": signature.max_images,
        "input": [
            {
                **configured(tensor),
                "format": "FORMAT_NONE" if tensor is IMAGE else "FORMAT_NHWC",
                "optional": True,  # one of the two
            }
            for tensor in signature.inputs
        ],
        "output": [configured(tensor) for tensor in signature.outputs],
        "dynamic_batching": {"max_queue_delay_microseconds": delay},
        "instance_group": [{"count": 1, "kind": kind}],
    }


def configured(tensor: Tensor) -> dict[str, Any]:
    """Return *tensor* as a line of a configuration."""
    return {"name": tensor.name, "data_type": CONFIG_TYPES[tensor.datatype], "dims": list(tensor.item)}


def statistics(model: Model) -> dict[str, Any]:
    """Return what the model has done since it was loaded; durations in nanoseconds.

    `compute_input` is decoding. The answer is put together outside of the model, so `compute_output` is 0.
    """
    ledger = model.statistics
    executions = ledger.executions()
    nothing = Sum()
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round(ledger.last * 1000),
        "inference_count": sum(images.count for images in ledger.batches.values()),
        "execution_count": sum(runs.count for runs in executions.values()),
        "inference_stats": {
            "success": duration(ledger.success),
            "fail": duration(ledger.failure),
            "queue": duration(ledger.stages.get("queue", nothing)),
            "compute_input": duration(ledger.stages.get("decode", nothing)),
            "compute_infer": duration(ledger.stages.get("infer", nothing)),
            "compute_output": duration(nothing),
            "cache_hit": duration(nothing),
            "cache_miss": duration(nothing),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": duration(nothing),
                "compute_infer": duration(runs),
                "compute_output": duration(nothing),
            }
            for size, runs in executions.items()
        ],
    }


def duration(total: Sum) -> dict[str, int]:
    """Return *total* as the protocol has it."""
    return {"count": total.count, "ns": round(total.seconds * 1e9)}


def indexed(model: Model) -> dict[str, str]:
    """Return the line of *model* in the index of the repository."""
    state, reason = ("UNAVAILABLE", "the engine has stopped") if model.dead else ("READY", "")
    return {"name": model.name, "version": model.version, "state": state, "reason": reason}
