"""iSQRT-COV: covariance pooling with an iterative matrix square root ("fast MPN-COV", "SR-SOP").

Paper: iSQRT-COV, section 3; DSoP section III-A uses it in every branch.
Letters: B images, C channels in, d channels after dimension reduction (DR), M positions, N iterations.
"""

from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.layers.covariance import upper_triangle_indices, without_autocast
from sopdeploy.layers.isqrt_gradient import Rule, isqrt_vector


class ISqrtCovConfig(StrictModel):
    """Switches of the layer that change its numbers.

    `width` is d, the channels the covariance is taken of; `iterations` is N (papers and
    fast-MPN-COV 5, released GSoP-Net2 and GM-SOP 3); `prenorm` divides by the trace or by the
    Frobenius norm before the iteration; with `compensate` its square root comes back after.
    """

    width: Annotated[int, pydantic.Field(ge=1)] = 256
    iterations: Annotated[int, pydantic.Field(ge=1, le=15)] = 5
    prenorm: Literal["trace", "frobenius"] = "trace"
    compensate: bool = True


class ISqrtCov(nn.Module):
    """Feature map (B, d, H, W) in, upper triangle of its covariance's root (B, d (d + 1) / 2) out."""

    triangle: Tensor

    def __init__(self, config: ISqrtCovConfig) -> None:
        super().__init__()
        self.config = config
        self.rule = Rule(config.iterations, config.prenorm, config.compensate)
        self.out_features = config.width * (config.width + 1) // 2
        self.register_buffer("triangle", upper_triangle_indices(config.width), persistent=False)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute in float32 at least, whatever autocast says: half precision loses the iteration."""
        with without_autocast(features_BdHW):
            return isqrt_vector(features_BdHW, self.triangle, self.rule)

    def extra_repr(self) -> str:
        """Name the switches in the printed module."""
        return f"width={self.config.width}, iterations={self.config.iterations}"


def dimension_reduction(channels: int, width: int) -> nn.Sequential:
    """Return DR: 1x1 convolution without bias, batch norm, ReLU; `channels` to `width` maps."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
