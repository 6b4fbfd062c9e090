"""Standard-deviation pooling: the spread of each channel over all positions."""

from typing import Literal

from torch import Tensor, nn

from sopdeploy import create_model
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig


class StdPooling(GlobalPooling):
    """Feature map (B, C, H, W) in, standard deviations (B, C) out."""

    def __init__(self, config: "StdConfig", channels: int) -> None:
        super().__init__()
        self.out_features, self.eps = channels, config.eps

    def pool(self, features: Tensor) -> Tensor:
        """Compute the standard deviation of each channel over all positions."""
        centered = features - features.mean(dim=(2, 3), keepdim=True)
        return (centered.square().mean(dim=(2, 3)) + self.eps).sqrt()


class StdConfig(PoolingConfig):
    """`eps` is added to the variance and keeps the gradient finite at 0."""

    layer = StdPooling
    kind: Literal["std"] = "std"
    eps: float = 1e-5


def std_resnet8(num_classes: int) -> nn.Module:
    """Build ResNet-8 for 32 x 32 pixels with this pooling."""
    return create_model("resnet8", num_classes=num_classes, pooling="std")
