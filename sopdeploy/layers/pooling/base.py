"""What every global pooling is: a feature map in, one vector per image out, and what classifies it."""

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
    """Feature map (B, C, H, W) in, representation (B, `out_features`) out."""

    keep_float32 = True
    cast_inputs = True
    low_precision_children = ("layer_reduce", "layer_reduce_bn")

    out_features: int

    def forward(self, features: Tensor) -> Tensor:
        """Return the representation; statistics are taken in float32 at least, under autocast too."""
        reduced = self.reduce(features)
        with without_autocast(reduced):
            return self.pool(at_least_float32(reduced))

    def reduce(self, features: Tensor) -> Tensor:
        """Return the map that statistics are taken of."""
        return features

    @abstractmethod
    def pool(self, features: Tensor) -> Tensor:
        """Return the representation of a float32 or float64 map."""

    def classifier(self, num_classes: int) -> nn.Module:
        """Return a new classifier of the representation, with its `in_features`."""
        return nn.Linear(self.out_features, num_classes)


class ReducedPooling(GlobalPooling):
    """A pooling that first reduces the channels to `width` where there are more of them.

    The parts are named as in fast-MPN-COV: `layer_reduce`, `layer_reduce_bn`.
    """

    def __init__(self, channels: int, width: int | None) -> None:
        super().__init__()
        self.channels = channels if width is None else min(channels, width)
        if self.channels < channels:
            self.layer_reduce, self.layer_reduce_bn, self.relu = dimension_reduction(channels, self.channels)

    def reduce(self, features: Tensor) -> Tensor:
        """Return (B, d, H, W): 1x1 convolution, batch norm, ReLU; the map itself if it is narrow enough."""
        if features.shape[1] == self.channels:
            return features
        reduced: Tensor = self.relu(self.layer_reduce_bn(self.layer_reduce(features)))
        return reduced


class PoolingConfig(StrictModel, ABC):
    """The switches of one pooling; its field `kind` is the pooling's name."""

    @abstractmethod
    def build(self, channels: int) -> GlobalPooling:
        """Return the pooling for maps of *channels* channels."""


def signed_root(vector: Tensor) -> Tensor:
    """Return sign(x) sqrt(|x| + 1e-8) of each element; the constant keeps the slope at 0 finite."""
    return vector.sign() * torch.sqrt(vector.abs() + 1e-8)


def steady_signed_root(vector: Tensor) -> Tensor:
    """Return x / sqrt(|x| + 1e-8): `signed_root` without its jump of 2e-4 at 0, where rounding may fall."""
    return vector * torch.rsqrt(vector.abs() + 1e-8)


def unit_length(vector: Tensor) -> Tensor:
    """Return vectors (B, D) divided by their length; zero vectors stay zero."""
    return F.normalize(vector, dim=1)


class GapConfig(PoolingConfig):
    """Nothing to choose."""

    kind: Literal["gap"] = "gap"

    def build(self, channels: int) -> GlobalPooling:
        """Return the mean over positions; it has no weights."""
        return GlobalAverage(channels)


class GlobalAverage(GlobalPooling):
    """Feature map (B, C, H, W) in, its mean (B, C) out; in the type of the map, autocast's included."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_features = channels

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean, written without adaptive pooling: it lowers to one ReduceMean."""
        return self.pool(features)

    def pool(self, features: Tensor) -> Tensor:
        """Return the mean over positions."""
        return features.mean(dim=(2, 3))
