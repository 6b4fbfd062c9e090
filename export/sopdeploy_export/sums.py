"""Fourier transforms, norms and squeezed axes as operators that every runtime computes precisely."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch._refs.fft
import torch.nn.functional as F
from torch import Tensor

LARGEST_MATRIX = 256  # rows of the matrix of a Fourier transform, unless the size has no such factors
BLOCK = 256  # numbers that are added one after the other
_TRANSFORMS = [f"{kind}fft{axes}" for kind in ("", "i", "r", "ir", "h", "ih") for axes in ("", "2", "n")]


def norm(
    values: Tensor,
    order: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Write a 2-norm of many values as sums of sums; NotImplemented for others.

    ONNX Runtime adds all squares one after the other, and the error of one sum grows with its length (Higham,
    "Accuracy and Stability", section 4.2).
    """
    axes = sorted(axis % values.dim() for axis in (dim or range(values.dim())))
    sizes = [values.shape[axis] for axis in axes]
    if order != 2 or dtype is not None or not all(isinstance(size, int) for size in sizes):
        return NotImplemented  # the operator stays
    count = math.prod(sizes)
    if count <= BLOCK:
        return NotImplemented  # the operator stays
    kept = [axis for axis in range(values.dim()) if axis not in axes]
    squares = (values * values).permute(*kept, *axes).flatten(len(kept))
    blocks = F.pad(squares, (0, -count % BLOCK)).reshape(*squares.shape[:-1], -1, BLOCK)
    result = blocks.sum(-1).sum(-1).sqrt()
    for axis in axes if keepdim else ():
        result = result.unsqueeze(axis)
    return result


def squeeze(values: Tensor, dim: int | Sequence[int]) -> Any:
    """Remove those of the axes *dim* that have size 1, as torch does.

    ONNX fails for other axes. Returns NotImplemented if all have size 1, or if a size is not fixed.
    """
    axes = [dim] if isinstance(dim, int) else list(dim)
    sizes = {axis: values.shape[axis] for axis in axes}
    if not all(isinstance(size, int) for size in sizes.values()) or all(size == 1 for size in sizes.values()):
        return NotImplemented  # the operator stays
    single = [axis for axis, size in sizes.items() if size == 1]
    return torch.squeeze(values, tuple(single)) if single else values.clone()


def transform_real(values: Tensor, *, dim: Sequence[int], onesided: bool) -> Any:
    """Write the Fourier transform of real *values* as products with constant matrices."""
    if not _have_fixed_sizes(values, dim):
        return NotImplemented  # the operator stays
    real, imaginary = _transform_axis(values, None, dim[-1], inverse=False)
    if onesided:
        half = values.shape[dim[-1]] // 2 + 1
        real, imaginary = (part.narrow(dim[-1], 0, half) for part in (real, imaginary))
    for axis in dim[:-1]:
        real, imaginary = _transform_axis(real, imaginary, axis, inverse=False)
    return torch.complex(real, imaginary)


def transform_complex(values: Tensor, *, dim: Sequence[int], forward: bool) -> Any:
    """Write the Fourier transform of complex *values* as products with constant matrices."""
    if not _have_fixed_sizes(values, dim):
        return NotImplemented  # the operator stays
    real, imaginary = torch.view_as_real(values).unbind(-1)
    for axis in dim:
        real, imaginary = _transform_axis(real, imaginary, axis, inverse=not forward)
    return torch.complex(real, imaginary)


def transform_to_real(values: Tensor, *, dim: Sequence[int], last_dim_size: int) -> Any:
    """Write the inverse transform to *last_dim_size* real values as products with constant matrices.

    *values* are the first half of the last axis of *dim*; the others are their conjugates.
    """
    size = last_dim_size
    if not _have_fixed_sizes(values, dim) or not isinstance(size, int):
        return NotImplemented  # the operator stays
    real, imaginary = torch.view_as_real(values).unbind(-1)
    for axis in dim[:-1]:
        real, imaginary = _transform_axis(real, imaginary, axis, inverse=True)
    last, mirrored = dim[-1], size - size // 2 - 1  # values 1 to `mirrored` occur again, in reverse
    real, imaginary = (part.narrow(last, 0, size // 2 + 1) for part in (real, imaginary))
    if mirrored:
        real = torch.cat([real, real.narrow(last, 1, mirrored).flip(last)], last)
        imaginary = torch.cat([imaginary, -imaginary.narrow(last, 1, mirrored).flip(last)], last)
    result, _ = _transform_axis(real, imaginary, last, inverse=True)
    return result


def _have_fixed_sizes(values: Tensor, dim: Sequence[int]) -> bool:
    return all(isinstance(values.shape[axis], int) for axis in dim)


def _transform_axis(
    real: Tensor, imaginary: Tensor | None, axis: int, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Transform one axis of complex values, without a factor; *imaginary* is None if all are real."""
    moved = None if imaginary is None else imaginary.movedim(axis, -1)
    results = _transform(real.movedim(axis, -1), moved, inverse=inverse)
    return results[0].movedim(-1, axis), results[1].movedim(-1, axis)


def _transform(real: Tensor, imaginary: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Transform the last axis, of size n, by a matrix, or if n is large by those of two factors of n.

    With n = p q, the value at q i + j is in row i and column j. Transforms of the columns, factors
    exp(-2 pi i j k / n) and transforms of the rows give the transform (Cooley and Tukey, 1965).
    """
    size = real.shape[-1]
    root = math.isqrt(size)
    rows = next((count for count in range(root, 1, -1) if size % count == 0), 1)
    if size <= LARGEST_MATRIX or rows == 1:
        cosines, sines = _waves(size, size, size, inverse=inverse)
        if imaginary is None:
            return real @ cosines, real @ sines
        return real @ cosines - imaginary @ sines, real @ sines + imaginary @ cosines
    columns = size // rows
    shape = (*real.shape[:-1], rows, columns)
    table = None if imaginary is None else imaginary.reshape(shape)
    real, imaginary = _transform_axis(real.reshape(shape), table, -2, inverse=inverse)
    cosines, sines = _waves(rows, columns, size, inverse=inverse)
    real, imaginary = real * cosines - imaginary * sines, real * sines + imaginary * cosines
    real, imaginary = _transform(real, imaginary, inverse=inverse)
    return real.transpose(-1, -2).flatten(-2), imaginary.transpose(-1, -2).flatten(-2)


def _waves(rows: int, columns: int, size: int, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return cos and sin of -2 pi j k / *size*, or of 2 pi j k / *size*, as float32 (*rows*, *columns*)."""
    steps = torch.outer(torch.arange(rows), torch.arange(columns)) % size  # exact, unlike the angle of j k
    angles = steps.double() * ((2 if inverse else -2) * math.pi / size)
    return angles.cos().float(), angles.sin().float()


SUMS = {
    # torch's own forms of these call the three below.
    **{
        getattr(torch.ops.aten, f"fft_{name}").default: getattr(torch._refs.fft, name) for name in _TRANSFORMS
    },
    torch.ops.aten.linalg_vector_norm.default: norm,
    torch.ops.aten.squeeze.dim: squeeze,
    torch.ops.aten.squeeze.dims: squeeze,
    torch.ops.prims.fft_r2c.default: transform_real,
    torch.ops.prims.fft_c2c.default: transform_complex,
    torch.ops.prims.fft_c2r.default: transform_to_real,
}
