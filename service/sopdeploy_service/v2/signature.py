"""What a model takes and gives, in the protocol's words.

A model has two inputs, and a request fills one of them: the tensor of the bundle, or `IMAGE`, encoded
image files that the server decodes as it does for its own endpoint.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sopdeploy.bundle import Bundle
from sopdeploy.manifest import TensorRecord

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
