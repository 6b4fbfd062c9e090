"""GAP: global average pooling, the first-order baseline.

Paper: Lin et al., "Network in Network" (ICLR 2014), section 3.2.
"""

from typing import Literal

from torch import Tensor

from sopdeploy.pooling.base import GlobalPooling, PoolingConfig


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
