"""The signature and the metadata of models in the form that Triton clients read."""

from dataclasses import dataclass
from typing import Any

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.inference.model import Model

DATATYPES = {"uint8": "UINT8", "float32": "FP32"}  # of the input and of the outputs of every bundle
EXTENSIONS = ("binary_tensor_data", "classification")


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
