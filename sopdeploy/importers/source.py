"""What every source is: it recognises its project's files and says their tensors' names here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess

MOST_BYTES = 4 << 30  # of all tensors of a file together; the largest published one has 0.7 GB


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of a MatConvNet network; `block` holds its settings, such as `iterNum` or `stride`."""

    name: str
    kind: str
    block: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """Tensors by the names they have in the file, without the prefixes of data parallelism.

    `arch` is what PyTorch training scripts store beside them. MatConvNet's files also hold `layers`, the
    `average` colour of 0..255 that is taken off every picture, and `image_size`; their tensors have
    MATLAB's axes. `beside` names what else is in the file and is not read.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    arch: str | None = None
    layers: tuple[Layer, ...] = ()
    average: tuple[float, float, float] | None = None
    image_size: int | None = None
    beside: tuple[str, ...] = field(default=())

    @property
    def is_matconvnet(self) -> bool:
        """Say whether the file is a MatConvNet network."""
        return bool(self.layers)


def checked(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return *tensors* if they are plain numbers of a bearable size in all; raises `WeightsError`.

    A few bytes can be declared to be a tensor of any shape, by strides of 0.
    """
    total = 0
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_complex()
        if not plain or tensor.is_meta:
            raise WeightsError(f"{path}: {name} is no plain tensor of real numbers; save it as float32")
        total += tensor.numel() * tensor.element_size()
        if total > MOST_BYTES:
            raise WeightsError(
                f"{path}: its tensors have more than {MOST_BYTES >> 30} GiB, which is too much"
            )
    return dict(tensors)


LabelSet = Literal["imagenet", "cifar10"]


class Mapped(NamedTuple):
    """One tensor of a network here: from which of the file's it was made, and how."""

    ours: str
    theirs: tuple[str, ...]
    tensor: Tensor
    how: str = "as it is"


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """A weight file in the words of the catalog.

    `looks_like` says in words what network it is, `name` what the catalog calls it (with the settings it
    takes), `None` where it has none. `must` are values, by dotted keys, that the config of the chosen
    name has to have. `read` are switches that the file itself holds, `usual` those that only the
    project's code holds; `ask` those that neither does, with the reason. `labels` is the order of
    classes where it is a known one.
    """

    looks_like: str
    name: str | None
    mapped: tuple[Mapped, ...]
    num_classes: int
    preprocess: Preprocess
    must: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    ask: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    labels: LabelSet | None = None
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """One project whose files can be imported."""

    project: str

    def recognises(self, file: WeightFile, name: str) -> bool:
        """Say whether *file*, to be imported as catalog model *name*, is one of this project's."""

    def translate(self, file: WeightFile, name: str) -> Translation:
        """Return *file* in the words of the catalog; raises `WeightsError`."""


def renamed(file: WeightFile, place: Callable[[str], str | None]) -> tuple[Mapped, ...]:
    """Return every tensor of *file* for which *place* knows a name here, unchanged."""

    def places() -> Iterator[Mapped]:
        for theirs, tensor in file.tensors.items():
            ours = place(theirs)
            if ours is not None:
                yield Mapped(ours, (theirs,), tensor)

    return tuple(places())
