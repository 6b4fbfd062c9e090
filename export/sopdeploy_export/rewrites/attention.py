"""Rules of the GSoP attention blocks.

The letters are those of `sopdeploy.layers.attention.gsop_attention`. The first batch norm turns row i of the
covariance into a_i S_i + c_i, and output r of row i is w_ir . (a_i S_i + c_i) + b_ir = (a_i w_ir) . S_i +
(b_ir + c_i sum(w_ir)), so other weights replace the norm. A second batch norm scales and shifts output ir,
and is folded in the same way. A convolution of n groups with kernel (n, 1) is n products of (B, n) with (n,
r), so one batched product can compute it, with weights that are transposed at export.

The default form is the convolution for single images and the product from a batch of four.
"""

from functools import partial

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
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy_export.rewrites.context import Build, RewriteContext
from sopdeploy_export.rewrites.linear import affine, is_frozen
from sopdeploy_export.rewrites.newton_schulz import CENTERING, Centering

FOLD = "row batch norm folded into the row-wise convolution"
FORM = "row-wise convolution as batched product or convolution"
POSITION = "position block as fixed small products"
PRODUCT_FROM = 4  # images in a batch


class FoldedExcitation(nn.Module, ExportHints):
    """`Excitation` without a norm: covariances (B, n, n) to weights (B, out, 1, 1).

    The rows are computed by one batched *product*, or by one grouped convolution.
    """

    keep_float32 = True
    weight: Tensor
    bias: Tensor

    def __init__(self, before: Excitation, *, product: bool) -> None:
        super().__init__()
        conv = before.row_conv
        self.product, self.rows, self.activation = product, conv.in_channels, before.activation
        self.conv = before.conv
        scale, shift = (values.repeat_interleave(OUTPUTS_PER_ROW) for values in affine(before.row_bn))
        weight = conv.weight.detach().double()  # rounded once, after folding in float64
        bias = torch.zeros(len(weight), dtype=torch.float64)
        bias = bias if conv.bias is None else conv.bias.detach().double()
        bias = bias + shift * weight.sum(dim=(1, 2, 3))
        weight = weight * scale[:, None, None, None]
        if not isinstance(before.norm, nn.Identity):
            scale, shift = affine(before.norm)
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        weight, bias = weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
        if product:  # (4n, 1, n, 1) to (n, n, r), and (4n) to (n, 1, r)
            weight = weight.reshape(self.rows, OUTPUTS_PER_ROW, self.rows).transpose(1, 2)
            bias = bias.reshape(self.rows, 1, OUTPUTS_PER_ROW)
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias.contiguous())

    def forward(self, cov_Bnn: Tensor) -> Tensor:
        """Compute the weights, in (0, 1)."""
        if self.product:
            out_nBr = cov_Bnn.transpose(0, 1) @ self.weight + self.bias
            rows_BR11 = out_nBr.transpose(0, 1).reshape(-1, self.rows * OUTPUTS_PER_ROW, 1, 1)
        else:
            rows_BR11 = F.conv2d(cov_Bnn.unsqueeze(3), self.weight, self.bias, groups=self.rows)
        return torch.sigmoid(self.conv(activate(rows_BR11, self.activation)))


FORMS: dict[str, Build] = {
    "convolution": partial(FoldedExcitation, product=False),
    "batched product": partial(FoldedExcitation, product=True),
}


def fold_row_norm(context: RewriteContext, where: str, part: Excitation) -> None:
    """Fold the frozen batch norms of one excitation, and choose how its row-wise convolution is computed."""
    if not is_frozen(part.row_bn) or not (isinstance(part.norm, nn.Identity) or is_frozen(part.norm)):
        return
    default = "batched product" if context.batch.optimum >= PRODUCT_FROM else "convolution"
    build, choice = context.choose_form(where, FORMS, default)
    context.replace(FOLD, where, build)
    rows = part.row_conv.in_channels
    context.report(
        FOLD,
        where,
        f"eval statistics of {rows} rows, followed by one convolution",
        f"{4 * rows} numbers fewer",
    )
    context.report(
        FORM, where, f"groups = rows = {rows}, kernel ({rows}, 1)", f"one {choice.form}; {choice.by}"
    )


def report_centering(context: RewriteContext, where: str, part: ChannelAttention | PositionAttention) -> None:
    """Report whether the constant I / c - 11^T / c^2 of one covariance subtracts the mean."""
    shape = context.activations[f"{where}.reduction"].output.shape
    if isinstance(part, PositionAttention):  # the reduced channels are the samples
        samples = shape[1]
        count = part.switches.side**2 if part.switches.covariance == "uncentred" else samples
    else:
        samples = count = shape[2] * shape[3]
    constant = Centering(1.0 / count, -1.0 / count**2, samples)
    total = constant.alpha + samples * constant.beta
    centered, released = "the mean is subtracted", "not centering: alpha X^T X + beta s s^T"
    context.report(
        CENTERING,
        where,
        f"alpha = {constant.alpha:.3g}, beta = {constant.beta:.3g}, alpha + {samples} beta = {total:.1g}",
        f"{centered if constant.removes_the_mean else released}; "
        f"{samples} additions instead of {samples**2} multiply-adds",
    )


def check_position_resampling(context: RewriteContext, where: str, part: PositionAttention) -> None:
    """Raise `LoweringError` unless each row of the block's resampling matrices is an average."""
    side = part.switches.side
    height, width = context.activations[where].inputs[0].shape[2:]
    up = nearest_rows if part.switches.upsampling == "nearest" else averaging_rows
    constants = averaging_rows(height, side), averaging_rows(width, side), up(side, height), up(side, width)
    for rows in map(np.array, constants):
        if (rows < 0).any() or np.abs(rows.sum(axis=1) - 1).max() > 1e-12:
            raise LoweringError(
                f"{where}: the rows of a resampling matrix do not sum to 1"
                "; --no-lowering exports without rewrite rules"
            )
    context.report(
        POSITION,
        where,
        "rows of the constants are non-negative and sum to 1",
        f"{height} x {width} to {side} x {side} and back in 4 products; no adaptive pooling, no resize",
    )
