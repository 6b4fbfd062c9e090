"""Rules of GSoP's excitation: row batch norm folded into the row-wise convolution; that as conv or product.

Letters as in `sopdeploy.layers.attention.gsop_attention`. Row i of the covariance becomes a_i S_i + c_i, and
output r of row i is w_ir . (a_i S_i + c_i) + b_ir = (a_i w_ir) . S_i + (b_ir + c_i sum(w_ir)): other weights,
no norm. A convolution of n groups with kernel (n, 1) is n products of (B, n) with (n, r), so it may be
written as one batched product; its weights are turned round once, here, and not in the graph.

Rule of thumb: the convolution for single images, the product from batches of four on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.attention.gsop_attention import (
    OUTPUTS_PER_ROW,
    ChannelAttention,
    Excitation,
    PositionAttention,
    activate,
    averaging_rows,
    nearest_rows,
)
from sopdeploy_export.rewrites.centering import NAME as CENTERING
from sopdeploy_export.rewrites.centering import Centering
from sopdeploy_export.rewrites.context import RewriteContext
from sopdeploy_export.rewrites.linear import affine, is_frozen

FOLD = "row batch norm folded into the row-wise convolution"
FORM = "row-wise convolution as batched product or convolution"
PRODUCT_FROM = 4  # images in a batch


class FoldedExcitation(nn.Module, ABC):
    """Covariance (B, n, n) in, weights (B, out, 1, 1) in (0, 1) out; no norm is left."""

    def __init__(self, before: Excitation) -> None:
        super().__init__()
        self.rows, self.activation, self.conv = before.row_conv.in_channels, before.activation, before.conv
        weight, bias = folded(before)
        self.register_buffer("weight", self.laid_out(weight).contiguous())
        self.register_buffer("bias", self.bias_laid_out(bias).contiguous())

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return the (4n, 1, n, 1) kernel as this form reads it."""
        return weight

    def bias_laid_out(self, bias: Tensor) -> Tensor:
        """Return the (4n) bias as this form reads it."""
        return bias

    @abstractmethod
    def by_row(self, cov_Bnn: Tensor) -> Tensor:
        """Return (B, 4n, 1, 1)."""

    def forward(self, cov_Bnn: Tensor) -> Tensor:
        """Return the weights."""
        return torch.sigmoid(self.conv(activate(self.by_row(cov_Bnn), self.activation)))


class ByConvolution(FoldedExcitation):
    """The rows by one grouped convolution."""

    weight: Tensor
    bias: Tensor

    def by_row(self, cov_Bnn: Tensor) -> Tensor:
        """Return (B, 4n, 1, 1)."""
        return F.conv2d(cov_Bnn.unsqueeze(3), self.weight, self.bias, groups=self.rows)


class ByProduct(FoldedExcitation):
    """The rows by one batched product."""

    weight: Tensor
    bias: Tensor

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return (n, n, r)."""
        return weight.reshape(self.rows, OUTPUTS_PER_ROW, self.rows).transpose(1, 2)

    def bias_laid_out(self, bias: Tensor) -> Tensor:
        """Return (n, 1, r)."""
        return bias.reshape(self.rows, 1, OUTPUTS_PER_ROW)

    def by_row(self, cov_Bnn: Tensor) -> Tensor:
        """Return (B, 4n, 1, 1)."""
        out_nBr = cov_Bnn.transpose(0, 1) @ self.weight + self.bias
        return out_nBr.transpose(0, 1).reshape(-1, self.rows * OUTPUTS_PER_ROW, 1, 1)


FORMS: dict[str, Callable[[Excitation], nn.Module]] = {
    "convolution": ByConvolution,
    "batched product": ByProduct,
}


def folded(before: Excitation) -> tuple[Tensor, Tensor]:
    """Return kernel (4n, 1, n, 1) and bias (4n) with the norm in them, rounded once from float64."""
    conv = before.row_conv
    scale, shift = (values.repeat_interleave(OUTPUTS_PER_ROW) for values in affine(before.row_bn))
    weight = conv.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64)
    bias = bias if conv.bias is None else conv.bias.detach().double()
    folded_bias = bias + shift * weight.sum(dim=(1, 2, 3))
    folded_weight = weight * scale[:, None, None, None]
    return folded_weight.to(conv.weight.dtype), folded_bias.to(conv.weight.dtype)


def apply(work: RewriteContext) -> None:
    """Fold the norm of every excitation with frozen statistics, and choose the form of its rows."""
    for where, part in work.parts(Excitation):
        if not is_frozen(part.row_bn):
            continue
        thumb = "batched product" if work.batch.optimum >= PRODUCT_FROM else "convolution"
        work.replace(FOLD, where, work.pick(where, FORMS, thumb))
        form = work.choices[-1].form
        rows = part.row_conv.in_channels
        work.note(
            FOLD,
            where,
            f"eval statistics of {rows} rows, one convolution behind",
            f"{4 * rows} numbers fewer",
        )
        work.note(
            FORM, where, f"groups = rows = {rows}, kernel ({rows}, 1)", f"one {form}; {work.choices[-1].by}"
        )


POSITION = "position block as fixed small products"


def apply_of_position(work: RewriteContext) -> None:
    """Check and write down the constants of every position block."""
    for where, part in work.parts(PositionAttention):
        side = part.switches.side
        height, width = work.calls[where].inputs[0].shape[2:]
        up = nearest_rows if part.switches.upsampling == "nearest" else averaging_rows
        constants = [
            averaging_rows(height, side),
            averaging_rows(width, side),
            up(side, height),
            up(side, width),
        ]
        for rows in constants:
            check_rows(where, np.array(rows))
        work.note(
            POSITION,
            where,
            "rows of the constants are non-negative and sum to 1",
            f"{height} x {width} to {side} x {side} and back in 4 products; no adaptive pooling, no resize",
        )


def check_rows(where: str, rows: np.ndarray) -> None:
    """Refuse a matrix that is not one of averages."""
    if (rows < 0).any() or np.abs(rows.sum(axis=1) - 1).max() > 1e-12:
        raise LoweringError(f"{where}: a resampling matrix does not average")


def apply_of_gsop_centring(work: RewriteContext) -> None:
    """Check and write down the constant of every GSoP covariance."""
    for where, _ in work.parts(ChannelAttention):
        height, width = work.calls[f"{where}.reduction"].output.shape[2:]
        note(work, where, written_for(height * width, rows=height * width))
    for where, position in work.parts(PositionAttention):
        samples = work.calls[f"{where}.reduction"].output.shape[1]
        released = position.switches.covariance == "uncentred"
        note(work, where, written_for(position.switches.side**2 if released else samples, rows=samples))


def written_for(count: int, *, rows: int) -> Centering:
    """Return I / count - 11^T / count^2 of *rows* rows."""
    return Centering(1.0 / count, -1.0 / count**2, rows)


def note(work: RewriteContext, where: str, constant: Centering) -> None:
    """Write down which form the constant allows."""
    alpha, beta = constant.alpha, constant.beta
    total = alpha + constant.size * beta
    form = "the mean is subtracted" if constant.removes_the_mean else "not centring: alpha X^T X + beta s s^T"
    work.note(
        CENTERING,
        where,
        f"alpha = {alpha:.3g}, beta = {beta:.3g}, alpha + {constant.size} beta = {total:.1g}",
        f"{form}; {constant.size} additions for {constant.size**2} multiply-adds",
    )
