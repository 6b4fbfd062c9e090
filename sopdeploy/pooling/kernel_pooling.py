"""Kernel pooling: compact features of a polynomial kernel up to the fourth order.

Paper: Cui et al., "Kernel Pooling for Convolutional Neural Networks" (CVPR 2017): 1, x, and for each
order p >= 2 a tensor sketch of the p-fold product of x, each order with a learnt weight; mean over
positions, signed root (without a jump at 0, where an FFT leaves rounding), unit length. With 4096
dimensions an order there are 12801 on VGG's 512 channels and 14337 on ResNet-50's 2048, the published 13K
and 14K. The weights start as the Taylor series of exp.
Letters: B images, C channels, M positions, D sketch dimensions, F = D / 2 + 1 frequencies.
"""

import math
from itertools import pairwise
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.pooling.base import GlobalPooling, PoolingConfig, steady_signed_root, unit_length
from sopdeploy.pooling.count_sketch import draw_sketches, sketched


class KernelPoolingConfig(PoolingConfig):
    """`dim` is the sketch dimension of each order from 2 to `order`; sketches are drawn from `seed`."""

    kind: Literal["kernel"] = "kernel"
    order: Annotated[int, pydantic.Field(ge=2, le=4)] = 4
    dim: Annotated[int, pydantic.Field(ge=2, multiple_of=2)] = 4096
    seed: Annotated[int, pydantic.Field(ge=0)] = 0

    def build(self, channels: int) -> GlobalPooling:
        """Return the layer."""
        return KernelPooling(self, channels)


class KernelPooling(GlobalPooling):
    """Feature map (B, C, H, W) in, (B, 1 + C + (order - 1) D) out."""

    not_exportable = "its FFT has no TensorRT form; train with pooling cbp, the second order without one"
    places: Tensor
    signs: Tensor

    def __init__(self, config: KernelPoolingConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.out_features = 1 + channels + (config.order - 1) * config.dim
        count = sum(range(2, config.order + 1))
        sketches = draw_sketches(count, channels, config.dim, config.seed)
        self.register_buffer("places", torch.tensor([s.places for s in sketches]), persistent=False)
        self.register_buffer("signs", torch.tensor([s.signs for s in sketches]), persistent=False)
        taylor = [1.0 / math.sqrt(math.factorial(p)) for p in range(config.order + 1)]
        self.order_weights = nn.Parameter(torch.tensor(taylor))

    def pool(self, features: Tensor) -> Tensor:
        """Return the vector."""
        x_BMC = features.flatten(start_dim=2).transpose(1, 2)
        orders = [x_BMC.new_ones(len(x_BMC), 1), x_BMC.mean(dim=1)]
        starts = [0, 2, 5, 9][: self.config.order]
        orders += [self.tensor_sketch(x_BMC, range(start, stop)) for start, stop in pairwise(starts)]
        weighted = [weight * order for weight, order in zip(self.order_weights, orders, strict=True)]
        return unit_length(steady_signed_root(torch.cat(weighted, dim=1)))

    def tensor_sketch(self, x_BMC: Tensor, sketches: range) -> Tensor:
        """Return the mean over positions (B, D) of the circular convolution of *sketches* of each."""
        spectrum_BMF = torch.ones((), dtype=torch.complex64, device=x_BMC.device)
        for s in sketches:
            sketch_BMD = sketched(x_BMC, self.places[s], self.signs[s], self.config.dim)
            spectrum_BMF = spectrum_BMF * torch.fft.rfft(sketch_BMD)
        mean_BD: Tensor = torch.fft.irfft(spectrum_BMF.mean(dim=1), n=self.config.dim)
        return mean_BD
