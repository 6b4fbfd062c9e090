"""What a weight file holds, whatever container it came in: named tensors and a few facts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sopdeploy.errors import WeightsError

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
