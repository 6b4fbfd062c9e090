"""Common types of the importers: weight files, their layers, and converted weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess


class Layer(NamedTuple):
    """A layer of a MatConvNet network; `block` holds its settings, such as `iterNum` or `stride`."""

    kind: str
    block: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """Content of a weight file; tensor names have no data-parallel prefixes.

    `arch` is the architecture name that PyTorch training scripts store. MatConvNet files also have `layers`
    by name, the `average_color` (0 to 255) that is subtracted from images, and `image_size`; their tensors
    have MATLAB's axes. `other_keys` lists content that is not imported.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    arch: str | None = None
    layers: Mapping[str, Layer] = field(default_factory=dict)
    average_color: tuple[float, float, float] | None = None
    image_size: float | None = None
    other_keys: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """Get the tensor *name*; raises `WeightsError` if the file has none."""
        if name not in self.tensors:
            raise WeightsError(f"{self.path}: has no {name}; give the file of a whole network")
        return self.tensors[name]


class MappedTensor(NamedTuple):
    """A tensor of a sopdeploy network: its name, and the source tensors it was computed from."""

    name: str
    sources: tuple[str, ...]
    tensor: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedWeights:
    """A weight file with the tensor names and settings of the catalog.

    `model` is the catalog name (with settings), None if the catalog has no such network. `required` are
    config values, by dotted key, that the model chosen by the user must have. `detected` are config values
    read from the file, by dotted key, `defaults` those fixed by the project's code. `undetermined` maps keys
    that the user must set, because neither the file nor the code determines them, to the reason. `labels`
    names the class order if it is a known one. `num_classes` is 0 for a file without a classifier.
    """

    description: str
    model: str | None
    tensors: tuple[MappedTensor, ...]
    num_classes: int
    preprocess: Preprocess
    required: Mapping[str, Any] = field(default_factory=dict)
    detected: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    undetermined: Mapping[str, str] = field(default_factory=dict)
    labels: Literal["imagenet", "cifar10"] | None = None
    notes: tuple[str, ...] = ()


def rename_tensors(
    file: WeightFile, rename: Callable[[str], str] = lambda name: name
) -> tuple[MappedTensor, ...]:
    """Rename the tensors of *file*; by default the names stay."""
    return tuple(MappedTensor(rename(name), (name,), tensor) for name, tensor in file.tensors.items())
