"""MatConvNet's arrays as PyTorch's: kernels, batch norms and matrices; everything in float64.

A kernel is height x width x in x out, and MATLAB drops trailing axes of one. A batch norm's moments are
C x 2, the mean and sqrt(variance + eps): its own eps is in them, that of here (1e-5) comes off again.
"""

import torch
from torch import Tensor

from sopdeploy.errors import WeightsError
from sopdeploy.importers.resnet_layout import tensor
from sopdeploy.importers.source import Mapped
from sopdeploy.importers.weight_file import WeightFile

EPS = 1e-5  # of every batch norm here


def kernel(file: WeightFile, name: str) -> Tensor:
    """Return convolution *name* as (out, in, height, width); both projects correlate, nothing is flipped."""
    found = tensor(file.path, file.tensors, name)
    if found.dim() > 4:
        raise WeightsError(f"{file.path}: {name} has {found.dim()} axes, a kernel has four")
    return found.reshape(*found.shape, *(1,) * (4 - found.dim())).permute(3, 2, 0, 1)


def pointwise(file: WeightFile, name: str) -> Tensor:
    """Return 1x1 convolution *name* as a matrix (out, in)."""
    found = kernel(file, name)
    if found.shape[2:] != (1, 1):
        raise WeightsError(f"{file.path}: {name} is no 1x1 convolution")
    return found[:, :, 0, 0]


def vector(file: WeightFile, name: str) -> Tensor:
    """Return *name*, C x 1 or 1 x C in MATLAB, as (C,)."""
    return tensor(file.path, file.tensors, name).reshape(-1)


def batch_norm(file: WeightFile, theirs: str, ours: str, order: Tensor | None = None) -> list[Mapped]:
    """Return the batch norm *theirs* as *ours*, its channels in *order* where one is given.

    Where the deviation is below sqrt(eps) no variance gives it; the factor then makes up for it.
    """
    moments = tensor(file.path, file.tensors, f"{theirs}_m")
    if moments.dim() != 2 or moments.shape[1] != 2:
        raise WeightsError(f"{file.path}: {theirs}_m is {tuple(moments.shape)}, not (channels, 2)")
    mean, deviation = moments.unbind(dim=1)
    if not bool((deviation > 0).all()):
        raise WeightsError(
            f"{file.path}: {theirs}_m has a deviation that is not positive; it was never trained"
        )
    variance = (deviation.square() - EPS).clamp_min(0.0)
    restored = (variance + EPS).sqrt()
    factor = torch.where(variance > 0, torch.ones_like(deviation), restored / deviation)
    parts = (
        ("weight", "w", vector(file, f"{theirs}_w") * factor, ""),
        ("bias", "b", vector(file, f"{theirs}_b"), ""),
        ("running_mean", "m", mean, "column 1"),
        ("running_var", "m", variance, f"column 2 squared, less {EPS:g}"),
    )
    return [
        Mapped(
            f"{ours}.{leaf}",
            (f"{theirs}_{end}",),
            *in_order(values, order, 0, how or "as it is"),
        )
        for leaf, end, values, how in parts
    ]


def in_order(values: Tensor, order: Tensor | None, axis: int, how: str) -> tuple[Tensor, str]:
    """Return *values* with *axis* in *order*, and how they were changed."""
    if order is None:
        return values, how
    if values.shape[axis] != len(order):
        return values, how  # of another length: the shape is refused where the network is compared
    return values.index_select(axis, order), f"{how}, triangle into rows' order".removeprefix("as it is, ")
