"""The GSoP block: a feature map scaled by weights from its own second-order statistics.

Paper: Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019), section 3,
Fig. 1(b), Table 2. Letters: B images, C channels, d channels after dimension reduction (DR), H
height, W width, n rows of the covariance, r = 4 outputs per row, R = 4n, P = s x s positions.

The released code feeds DR with a rectified copy of the map (`pre_relu`; the scaled map itself
is not rectified) and lets DR stride by 2 in conv2_x (`dr_stride`). The covariance is centered
and divided by the number of positions; the block takes no matrix root.

Table 2 has a batch norm between the row-wise convolution and its LReLU. The released code has
none. In the position-wise half the printed 0.16 M parameters decide against it: 0.1647 M
without, 0.1652 M with. In the channel-wise half both give the printed 0.72 M, so the paper's
text decides for it.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.base.config import StrictModel, from_options
from sopdeploy.errors import ConfigError
from sopdeploy.layers.covariance import (
    at_least_float32,
    covariance_matrix,
    without_autocast,
)
from sopdeploy.layers.export_hints import ExportHints

BlockActivation = Literal["none", "relu", "lrelu"]
FusionKind = Literal["average", "sum", "maximum", "concatenation"]
OUTPUTS_PER_ROW = 4
CHANNELS_PER_GROUP = 64
MOST_GROUPS = 32


class GSoPBlockConfig(StrictModel):
    """Options of the block; defaults are the paper's.

    `attention` selects the weights that scale the map: of channels, of positions, or of both,
    with the way to fuse the two results. `cov_width` is d. `position_side` is the side of the
    map whose positions are correlated (6, 8 and 12 are Table 4's 36, 64 and 144).
    `channel_norm` adds a batch norm after the row-wise convolution of the channel-wise half
    (Table 2). `models.gsop.RELEASED` lists the options in which the released code differs from
    the paper.

    Examples:
        >>> config = sopdeploy.layers.GSoPBlockConfig(attention="position", position_side=6)
        >>> sopdeploy.layers.GSoPBlock(config, channels=256)(torch.rand(2, 256, 14, 14)).shape
        torch.Size([2, 256, 14, 14])
    """

    attention: Literal["channel", "position"] | FusionKind = "channel"
    cov_width: Annotated[int, pydantic.Field(ge=32, le=256)] = 128
    position_side: Annotated[int, pydantic.Field(ge=2, le=16)] = 8
    pre_relu: bool = False
    channel_norm: bool = True
    channel_activation: BlockActivation = "lrelu"
    position_activation: BlockActivation = "lrelu"
    position_rectify: Literal["reduced", "scaled"] = "reduced"
    position_covariance: Literal["centred", "uncentred"] = "centred"
    position_upsampling: Literal["nearest", "average"] = "nearest"


def activate(x: Tensor, activation: BlockActivation) -> Tensor:
    """Apply no activation, ReLU or LReLU(0.1)."""
    if activation == "lrelu":
        return F.leaky_relu(x, 0.1)
    return F.relu(x) if activation == "relu" else x


class RowConv(nn.Conv2d):
    """Row-wise convolution: (B, n, n, 1) to (B, 4n, 1, 1); outputs 4i to 4i + 3 read row i.

    It has the parameters of the paper's convolution with n groups and kernel (n, 1), but
    computes one batched product, because runtimes have slow kernels for many groups with an
    output of one pixel.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(rows, OUTPUTS_PER_ROW * rows, (rows, 1), groups=rows)

    def forward(self, cov_Bnn1: Tensor) -> Tensor:
        """Convolve each of the n rows with its r = 4 filters: (B, n, n, 1) to (B, R, 1, 1), where R = 4n."""
        rows = self.in_channels
        cov_nBn = cov_Bnn1.squeeze(3).transpose(0, 1)

        # The stored weight has the shape (R, 1, n, 1).
        weight_nnr = self.weight.reshape(rows, OUTPUTS_PER_ROW, rows).transpose(1, 2)
        out_nBr = torch.matmul(cov_nBn, weight_nnr)
        out_BR11 = out_nBr.transpose(0, 1).reshape(-1, rows * OUTPUTS_PER_ROW, 1, 1)
        return out_BR11 if self.bias is None else out_BR11 + self.bias[:, None, None]


class Excitation(nn.Module, ExportHints):
    """Map a covariance (B, n, n) to weights (B, out, 1, 1) in (0, 1), by rows; with *norm* batch norm."""

    keep_float32 = True

    def __init__(
        self, rows: int, out_channels: int, activation: BlockActivation, *, norm: bool
    ) -> None:
        super().__init__()
        self.activation: BlockActivation = activation
        self.row_bn = nn.BatchNorm2d(rows)
        self.row_conv = RowConv(rows)
        self.norm: nn.Module = nn.Identity()
        if norm:
            self.norm = nn.BatchNorm2d(OUTPUTS_PER_ROW * rows)
        self.conv = nn.Conv2d(OUTPUTS_PER_ROW * rows, out_channels, 1)

    def forward(self, cov_Bnn: Tensor) -> Tensor:
        """Compute the weights (B, out, 1, 1) from a covariance (B, n, n)."""
        rows_BR11 = self.norm(self.row_conv(self.row_bn(cov_Bnn.unsqueeze(3))))
        return torch.sigmoid(self.conv(activate(rows_BR11, self.activation)))


class ChannelAttention(nn.Module, ExportHints):
    """Map features (B, C, H, W) to channel weights (B, C, 1, 1)."""

    output_in_network_dtype = True

    def __init__(self, config: GSoPBlockConfig, channels: int, dr_stride: int) -> None:
        super().__init__()
        self.config = config

        width = config.cov_width
        self.reduction = nn.Sequential(
            nn.Conv2d(channels, width, 1, stride=dr_stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.excitation = Excitation(
            width, channels, config.channel_activation, norm=config.channel_norm
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Compute the weights; the covariance is float32 or float64."""
        reduced_BdHW = self.reduction(
            F.relu(features_BCHW) if self.config.pre_relu else features_BCHW
        )
        with without_autocast(reduced_BdHW):
            cov_Bdd = covariance_matrix(at_least_float32(reduced_BdHW))
        return self.excitation(cov_Bdd)


RowBuilder = Callable[[int, int, Tensor], Tensor]


def averaging_rows(size: int, target: int, like: Tensor) -> Tensor:
    """Build the (target, size) matrix of adaptive average pooling along one side, with the dtype of *like*.

    Row i averages from floor(i size / target) up to, not including, ceil((i + 1) size /
    target).
    """
    row = torch.arange(target, device=like.device)[:, None]
    start = row * size // target
    stop = ((row + 1) * size + target - 1) // target

    column = torch.arange(size, device=like.device)
    is_averaged = (start <= column) & (column < stop)
    return is_averaged.to(like.dtype) / (stop - start)


def nearest_rows(size: int, target: int, like: Tensor) -> Tensor:
    """Build the (target, size) matrix of nearest-neighbor sampling: row i reads floor(i size / target)."""
    row = torch.arange(target, device=like.device)[:, None]
    column = torch.arange(size, device=like.device)
    return (column == row * size // target).to(like.dtype)


def resample(x_BCHW: Tensor, height: int, width: int, build_rows: RowBuilder) -> Tensor:
    """Resize *x_BCHW* to (B, C, height, width), each side by the matrix that *build_rows* builds.

    Operators compute the matrices from the sizes: a tensor made of Python numbers would be a constant
    that no weight file has, which the export refuses.
    """
    matrix_hH = build_rows(x_BCHW.shape[2], height, x_BCHW)
    matrix_wW = build_rows(x_BCHW.shape[3], width, x_BCHW)
    return matrix_hH @ x_BCHW @ matrix_wW.T


class PositionAttention(nn.Module, ExportHints):
    """Map features (B, C, H, W) to position weights (B, 1, H, W)."""

    output_in_network_dtype = True

    def __init__(self, config: GSoPBlockConfig, channels: int) -> None:
        super().__init__()
        self.config = config

        width = config.cov_width
        self.reduction = nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width))
        positions = config.position_side**2
        self.excitation = Excitation(
            positions, positions, config.position_activation, norm=False
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Compute the weights; the covariance of P = s x s positions over d channels is at least float32."""
        config = self.config
        side = self.config.position_side
        height, width = features_BCHW.shape[2:]

        reduced_BdHW = self.reduction(
            F.relu(features_BCHW) if config.pre_relu else features_BCHW
        )

        # A map of s x s positions, whose P = s^2 covariances relate position to position.
        if config.position_rectify == "reduced":
            reduced_BdHW = F.relu(reduced_BdHW)
        with without_autocast(reduced_BdHW):
            small_Bdss = resample(at_least_float32(reduced_BdHW), side, side, averaging_rows)
            small_BdP = small_Bdss.flatten(start_dim=2)
            # `covariance_matrix` reads (B, variables, samples); here, the positions are the
            # variables.
            if config.position_covariance == "centred":
                cov_BPP = covariance_matrix(small_BdP.transpose(1, 2))
            else:  # `uncentred_covariance` reads (B, samples, variables)
                cov_BPP = uncentred_covariance(small_BdP)

        # Weights of the small map, as large as the map that they scale.
        weights_B1ss = self.excitation(cov_BPP).reshape(-1, 1, side, side)
        build_rows = nearest_rows if config.position_upsampling == "nearest" else averaging_rows
        return resample(weights_B1ss, height, width, build_rows)


def uncentred_covariance(small_BdP: Tensor) -> Tensor:
    """Compute X^T X / P - t^T t / P^2 as (B, P, P), where t (B, 1, P) sums X (B, d, P) over the channels.

    The released code intends to center, but its centering matrix is built for P samples while
    there are d. Where d differs from P the mean is not removed, and the result has negative
    eigenvalues.
    """
    positions = small_BdP.shape[2]
    sums_B1P = small_BdP.sum(dim=1, keepdim=True)
    moments_BPP = small_BdP.transpose(1, 2) @ small_BdP / positions
    return moments_BPP - sums_B1P.transpose(1, 2) @ sums_B1P / positions**2


class Concatenation(nn.Module):
    """Fuse two tensors (B, C, H, W): grouped convolutions with kernel (k, 1), sum, batch norm.

    This equals the "one convolutional layer" of the concatenation in section 4.1, with the
    kernel and groups of the released code, because the paper does not print them (assumption).
    k, along the height, is 11, 9, 7, 5 for C = 256, 512, 1024, 2048: fewer groups have longer
    kernels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = channels // CHANNELS_PER_GROUP
        if groups == 0 or channels % groups:  # the convolutions need groups of equal size
            raise ConfigError(
                "attention=concatenation: needs a multiple of "
                f"{CHANNELS_PER_GROUP} channels, got {channels}; choose average, "
                "sum or maximum, or a wider network"
            )

        # As in the released code: twice as many groups, of 64 channels each, have a kernel that is
        # shorter by 2.
        reach = int(math.log2(MOST_GROUPS / groups)) + 2  # 5, 4, 3, 2 for 4, 8, 16, 32 groups
        kernel = (2 * reach + 1, 1)
        padding = (reach, 0)
        self.conv_channel = nn.Conv2d(
            channels, channels, kernel, padding=padding, groups=groups
        )
        self.conv_position = nn.Conv2d(
            channels, channels, kernel, padding=padding, groups=groups
        )
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, by_channel: Tensor, by_position: Tensor) -> Tensor:
        """Compute the fused tensor."""
        return self.bn(self.conv_channel(by_channel) + self.conv_position(by_position))


class GSoPBlock(nn.Module):
    """Scale a feature map (B, C, H, W); the shortcut is not part of the block.

    Args:
        config: Options of the block; by default the paper's.
        channels: C.
        dr_stride: Stride of the dimension reduction.
        **options: The fields of `GSoPBlockConfig`, in the place of *config*.

    Raises:
        ConfigError: An option is invalid, or `attention` is "concatenation", and C is not a multiple of 64.

    Examples:
        >>> block = sopdeploy.layers.GSoPBlock(channels=256, cov_width=64)
        >>> block(torch.rand(2, 256, 14, 14)).shape
        torch.Size([2, 256, 14, 14])
    """

    channel: ChannelAttention | None
    position: PositionAttention | None
    fusion: Concatenation | None

    def __init__(
        self,
        config: GSoPBlockConfig | None = None,
        channels: int = 256,
        dr_stride: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        config = from_options(GSoPBlockConfig, config, options)
        self.config = config
        kind = config.attention

        self.channel = self.position = self.fusion = None
        if kind != "position":
            self.channel = ChannelAttention(config, channels, dr_stride)
        if kind != "channel":
            self.position = PositionAttention(config, channels)
            if kind == "concatenation":
                self.fusion = Concatenation(channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Scale the map by channel, by position, or by both and fuse the two."""
        # The map scaled by channel, and the map scaled by position.
        by_channel = features_BCHW
        if self.channel is not None:
            by_channel = features_BCHW * self.channel(features_BCHW)

        if self.position is None:
            return by_channel
        by_position = features_BCHW * self.position(features_BCHW)
        # With "reduced", the ReLU is inside of `self.position`.
        if self.config.position_rectify == "scaled":
            by_position = F.relu(by_position)

        if self.channel is None:
            return by_position

        # Fuse the two scaled maps.
        if self.fusion is not None:
            return self.fusion(by_channel, by_position)
        if self.config.attention == "maximum":
            return torch.maximum(by_channel, by_position)
        total = by_channel + by_position
        return total if self.config.attention == "sum" else total * 0.5
