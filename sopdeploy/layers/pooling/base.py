"""Global pooling interface: a feature map in, one vector per image out, and the classifier of the vector."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.layers.covariance import at_least_float32, without_autocast
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.isqrt_cov import dimension_reduction


class GlobalPooling(nn.Module, ExportHints, ABC):
    """Base class of layers that map features (B, C, H, W) to vectors (B, `out_features`)."""

    keep_float32 = True
    cast_inputs = True
    low_precision_children = ("layer_reduce", "layer_reduce_bn")
    out_features: int

    def forward(self, features: Tensor) -> Tensor:
        """Compute the vectors; statistics are float32 or float64, also under autocast."""
        reduced = self.reduce(features)
        with without_autocast(reduced):
            return self.pool(at_least_float32(reduced))

    def reduce(self, features: Tensor) -> Tensor:
        """Compute the map whose statistics are pooled; the default is the input."""
        return features

    @abstractmethod
    def pool(self, features: Tensor) -> Tensor:
        """Compute the vectors of a float32 or float64 map."""

    def classifier(self, num_classes: int) -> nn.Module:
        """Build a classifier of the vectors; it has `in_features`."""
        return nn.Linear(self.out_features, num_classes)


class ReducedPooling(GlobalPooling):
    """A pooling that first reduces the channels to `width` where there are more of them.

    Attributes have fast-MPN-COV's names: `layer_reduce`, `layer_reduce_bn`.
    """

    def __init__(self, channels: int, width: int | None) -> None:
        super().__init__()
        self.channels = channels if width is None else min(channels, width)
        if self.channels < channels:
            self.layer_reduce, self.layer_reduce_bn, self.relu = dimension_reduction(channels, self.channels)

    def reduce(self, features: Tensor) -> Tensor:
        """Reduce to (B, d, H, W) by 1x1 convolution, batch norm, ReLU; narrow maps stay as they are."""
        if features.shape[1] == self.channels:
            return features
        reduced: Tensor = self.relu(self.layer_reduce_bn(self.layer_reduce(features)))
        return reduced


class PoolingConfig(StrictModel, ABC):
    """Base class of the options of a pooling; the field `kind` is the pooling's name."""

    @abstractmethod
    def build(self, channels: int) -> GlobalPooling:
        """Build the pooling for maps of *channels* channels."""


def signed_root(vector: Tensor) -> Tensor:
    """Compute sign(x) sqrt(|x| + 1e-8) of each element; the constant keeps the slope at 0 finite."""
    return vector.sign() * torch.sqrt(vector.abs() + 1e-8)


def steady_signed_root(vector: Tensor) -> Tensor:
    """Compute x / sqrt(|x| + 1e-8): `signed_root` without its jump of 2e-4 at 0, where rounding may fall."""
    return vector * torch.rsqrt(vector.abs() + 1e-8)


def unit_length(vector: Tensor) -> Tensor:
    """Divide vectors (B, D) by their length; zero vectors stay zero."""
    return F.normalize(vector, dim=1)


class GapConfig(PoolingConfig):
    """Global average pooling; it has no options."""

    kind: Literal["gap"] = "gap"

    def build(self, channels: int) -> GlobalPooling:
        """Build the layer; it has no weights."""
        return GlobalAverage(channels)


class GlobalAverage(GlobalPooling):
    """Average (B, C, H, W) maps to (B, C), in the type of the map, also under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_features = channels

    def forward(self, features: Tensor) -> Tensor:
        """Compute the mean over positions without adaptive pooling: it lowers to one ReduceMean."""
        return self.pool(features)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the mean over positions."""
        return features.mean(dim=(2, 3))
