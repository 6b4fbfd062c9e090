"""Global pooling interface: a feature map in, one vector per image out."""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.base.config import Count, StrictModel
from sopdeploy.layers.covariance import at_least_float32, without_autocast
from sopdeploy.layers.export_hints import ExportHints

SMALLEST_LENGTH = 1e-12


def dimension_reduction(
    channels: int, width: int, activation: type[nn.ReLU] | type[nn.SiLU] = nn.ReLU
) -> nn.Sequential:
    """Build a dimension reduction (DR) from *channels* to *width*: 1x1 conv, batch norm, activation."""
    convolution = nn.Conv2d(channels, width, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), activation(inplace=True))


class GlobalPooling(nn.Module, ExportHints):
    """Base class of layers that map features (B, C, H, W) to vectors (B, `out_features`).

    A subclass defines `pool`, or `forward` if it computes in the type of the map. The children
    `layer_reduce`, `layer_reduce_bn` and `relu` of a subclass run first; the names are
    fast-MPN-COV's.
    """

    keep_float32 = True
    cast_inputs = True
    low_precision_children = ("layer_reduce", "layer_reduce_bn")
    out_features: int

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, `out_features`), computed in float32 or float64, also under autocast."""
        reduced = self.reduce(features)
        with without_autocast(reduced):
            return self.pool(at_least_float32(reduced))

    def reduce(self, features: Tensor) -> Tensor:
        """Reduce the channels to the map (B, d, H, W) that is pooled; the input itself without children."""
        for name in ("layer_reduce", "layer_reduce_bn", "relu"):
            if name in self._modules:
                features = self.get_submodule(name)(features)
        return features

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vectors (B, `out_features`) of a float32 or float64 map (B, d, H, W)."""
        raise NotImplementedError(f"{type(self).__name__}: pool of {tuple(features.shape)}")


class ReducedPooling(GlobalPooling):
    """A pooling that first reduces the channels to `width` where there are more of them.

    The reduction is a 1x1 convolution, batch norm and ReLU; with *linear* only the convolution.
    A covariance does not depend on a bias.
    """

    def __init__(self, channels: int, width: int, *, linear: bool = False) -> None:
        super().__init__()
        self.channels = min(channels, width)

        # If nothing is reduced, there is no such child: `reduce` runs those that exist.
        self.layer_reduce: nn.Module
        if self.channels < channels and linear:
            self.layer_reduce = nn.Conv2d(channels, self.channels, 1, bias=False)
        elif self.channels < channels:
            self.layer_reduce, self.layer_reduce_bn, self.relu = dimension_reduction(
                channels, self.channels
            )


class PoolingConfig(StrictModel):
    """Base class of the options of a pooling; the field `kind` is the pooling's name.

    `layer` is the pooling's class, called with the config and the number of channels of the
    map.
    """

    layer: ClassVar[Any]

    def build(self, channels: int) -> GlobalPooling:
        """Build the pooling for maps of *channels* channels."""
        return self.layer(self, channels)


def unit_length(values: Tensor, dim: int) -> Tensor:
    """Divide *values* by their Euclidean length along *dim*; zeros stay zeros.

    The result is bitwise equal to that of `torch.nn.functional.normalize`. That function also
    expands the lengths to the shape of *values*. In ONNX the expansion computes a shape, which
    ONNX Runtime does on the CPU.
    """
    length = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    # In float16, 1e-12 would be 0.
    smallest = max(SMALLEST_LENGTH, torch.finfo(values.dtype).tiny)
    return values / length.clamp_min(smallest)


def unit_signed_root(vector_BD: Tensor) -> Tensor:
    """Compute sign(x) sqrt(|x| + 1e-8) of each element, then divide vectors (B, D) by their length.

    The constant keeps the slope at 0 finite; zero vectors stay zero.
    """
    return unit_length(vector_BD.sign() * torch.sqrt(vector_BD.abs() + 1e-8), dim=1)


class GlobalAverage(GlobalPooling):
    """Average (B, C, H, W) maps to (B, C), in the type of the map, also under autocast."""

    def __init__(self, _config: "GapConfig", channels: int) -> None:
        super().__init__()
        self.out_features = channels

    def forward(self, features: Tensor) -> Tensor:
        """Compute the mean over positions without adaptive pooling: it lowers to one ReduceMean."""
        return features.mean(dim=(2, 3))


class GapConfig(PoolingConfig):
    """Global average pooling; it has no options."""

    layer = GlobalAverage
    kind: Literal["gap"] = "gap"


def _require_average(value: Any) -> Any:
    """Return the config of the average; raise `ValueError` for that of another pooling."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", value)
    if kind != "gap":
        raise ValueError(
            "this network has its own pooling, so `pooling` can only be gap; leave it out"
        )
    return {"kind": kind}


FixedAverage = Annotated[GapConfig, pydantic.BeforeValidator(_require_average)]


class FlattenedMap(GlobalPooling):
    """Flatten (B, C, H, W) maps to (B, C side^2) after max pooling, as AlexNet and VGG-16 do.

    The max pooling has a stride of 2. If its result is not side x side, it is averaged to this
    size, as in torchvision. The vector is computed in the type of the map, also under autocast.
    """

    def __init__(self, config: "FlattenConfig", channels: int) -> None:
        super().__init__()
        self.window = config.window
        self.side = config.side
        self.out_features = channels * config.side**2

    def forward(self, features: Tensor) -> Tensor:
        """Compute the vector, channel by channel."""
        pooled = F.max_pool2d(features, self.window, stride=2)
        if pooled.shape[2:] != (self.side, self.side):
            pooled = F.adaptive_avg_pool2d(pooled, self.side)
        return pooled.flatten(start_dim=1)


class FlattenConfig(PoolingConfig):
    """`window` is the side of the max pooling: 2 in VGG-16, 3 in AlexNet; their `side` is 7 and 6."""

    layer = FlattenedMap
    kind: Literal["flatten"] = "flatten"
    window: Annotated[int, pydantic.Field(ge=2, le=3)] = 2
    side: Count = 7
