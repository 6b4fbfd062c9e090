"""Forms of operators that ONNX has, and that every runtime computes precisely.

Among them are attention, Fourier transforms, norms and squeezed axes.
"""

import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch._refs.fft
import torch.nn.functional as F
from torch import Tensor, fx
from torch.export import ExportedProgram

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
# A Fourier transform of at most so many values is a product with one matrix. A larger one is made
# of transforms whose sizes are factors of its size, unless this is prime.
LARGEST_MATRIX = 256
BLOCK = 256  # numbers that are added one after the other


# Whether `_masked_attention` calls attention: then `_attention` must not handle the mask again.
_handles_mask: ContextVar[bool] = ContextVar("_handles_mask", default=False)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> Any:
    """Rewrite attention with a mask, and attention of tensors that do not have four axes.

    `_masked_attention` handles a mask. For another number of axes, products of matrices and a
    softmax take the place of the operator. All other attention stays as it is
    (`NotImplemented`). torch calls this form wherever `ATTENTION` is called, also in
    `_masked_attention`; `_handles_mask` is true there.
    """
    if mask is not None and not _handles_mask.get():
        return _masked_attention(query, key, value, mask, *args, **options)
    if query.dim() == 4:
        return NotImplemented
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, mask, *args, **options
    )[0]


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *args: Any, **options: Any
) -> Any:
    """Write attention with *mask* as numbers that it adds to its scores: 0 or -inf for a boolean mask.

    The result of a query that may read no key is 0, not the NaN of a softmax over -inf alone.
    """
    # Which keys a query may read, and the numbers that are added to their scores.
    if mask.dtype == torch.bool:
        is_allowed = mask
        added = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    else:
        is_allowed = mask != -torch.inf
        added = mask

    # This calls `_attention` again, which handles no mask while `_handles_mask` is true.
    token = _handles_mask.set(True)
    try:
        result = ATTENTION(query, key, value, added, *args, **options)
    finally:
        _handles_mask.reset(token)

    # The operators that follow may view the result, which needs the strides that it has now.
    may_read_nothing = ~is_allowed.any(-1, keepdim=True)
    return _with_strides_of(result, result.masked_fill(may_read_nothing, 0.0))


def _with_strides_of(result: Tensor, values: Tensor) -> Tensor:
    """Copy *values* with its axes in memory in the order of the axes of *result*.

    Then the values can be viewed as *result* can.
    """
    axes = sorted(range(result.dim()), key=result.stride, reverse=True)
    inverse = [axes.index(axis) for axis in range(len(axes))]
    return values.permute(axes).contiguous().permute(inverse)


def _log1p(values: Tensor) -> Tensor:
    """Write log(1 + x) without its cancellation near 0 (Higham, "Accuracy and Stability", section 1.14.1)."""
    rounded = 1 + values
    near = torch.where(rounded == 1, values, rounded.log() * (values / (rounded - 1)))
    return torch.where(values.abs() < 0.5, near, rounded.log())


def _expm1(values: Tensor) -> Tensor:
    """Write exp(x) - 1 without its cancellation near 0 (Higham, "Accuracy and Stability", section 1.14.1)."""
    power = values.exp()
    near = torch.where(power == 1, values, (power - 1) * (values / power.log()))
    return torch.where(values.abs() < 0.5, near, power - 1)


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    """Write the angle of the point (x, y), from -pi to pi, also if a coordinate is 0, -0 or infinite."""
    # The signs of coordinates, also of zeros: 1 / -0 is negative.
    is_below = (y < 0) | (1 / y < 0)
    is_left = (x < 0) | (1 / x < 0)

    # The slope. With two infinite coordinates, it is the slope of a diagonal.
    is_far = (y.abs() == torch.inf) & (x.abs() == torch.inf)
    divisor = torch.where((x == 0) & (y == 0), 1.0, x)
    slope = torch.where(is_far, y.sign() * x.sign(), y / divisor)

    # The arc tangent is the angle if x is positive. Left of the y-axis, it is the angle of the
    # opposite point (-x, -y), half a turn away.
    angle = slope.atan()
    half_turn = torch.where(is_below, -torch.pi, torch.pi)
    return angle + torch.where(is_left, half_turn, 0.0)


def _sort(values: Tensor, *, dim: int = -1, descending: bool = False, **_stable: bool) -> Any:
    """Write a stable sort as `TopK` of all elements, which is stable, and needs no shape at run time.

    A scalar, and an axis whose size varies, are sorted by `sort`.
    """
    if values.dim() == 0 or not isinstance(values.shape[dim], int):
        return torch.ops.aten.sort.default(values, dim, descending)
    return torch.ops.aten.topk.default(values, values.shape[dim], dim, descending)


def _index_put(
    values: Tensor, indices: Sequence[Tensor | None], new: Tensor, accumulate: bool = False
) -> Tensor:
    """Write x[mask] = number as a `where`, because a graph has no size for the number of chosen values.

    Returns NotImplemented for other indices, for several numbers and for additions.
    """
    is_mask = len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool
    if not is_mask or new.numel() != 1 or accumulate:
        return NotImplemented  # the operator stays

    # The mask belongs to the first axes, so it gets an axis of size 1 for each further axis.
    mask = cast(Tensor, indices[0])
    num_further = values.dim() - mask.dim()
    return torch.where(mask.reshape(*mask.shape, *[1] * num_further), new.reshape(()), values)


def norm(
    values: Tensor,
    order: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Write a 2-norm of more than `BLOCK` values with sums of blocks.

    Returns NotImplemented for another norm, for fewer values, for sizes that are not fixed, and if
    *dtype* is given. ONNX Runtime adds all squares one after the other, and the error of such a sum grows with its
    length (Higham, "Accuracy and Stability", section 4.2).
    """
    axes = sorted(axis % values.dim() for axis in (dim or range(values.dim())))
    sizes = [values.shape[axis] for axis in axes]
    if order != 2 or dtype is not None or not all(isinstance(size, int) for size in sizes):
        return NotImplemented  # the operator stays
    count = math.prod(sizes)
    if count <= BLOCK:
        return NotImplemented  # the operator stays

    # The squares, with the axes of the norm as the last one (..., count). Then in blocks (...,
    # number of blocks, BLOCK), of which zeros fill up the last one.
    other_axes = [axis for axis in range(values.dim()) if axis not in axes]
    squares = (values * values).permute(*other_axes, *axes).flatten(len(other_axes))
    blocks = F.pad(squares, (0, -count % BLOCK)).reshape(*squares.shape[:-1], -1, BLOCK)

    result = blocks.sum(-1).sum(-1).sqrt()
    if keepdim:
        for axis in axes:
            result = result.unsqueeze(axis)
    return result


def squeeze(values: Tensor, dim: int | Sequence[int]) -> Any:
    """Remove those of the axes *dim* that have size 1, as torch does; ONNX fails for an axis of another size.

    Returns NotImplemented if all of *dim* have size 1, or if a size is not fixed.
    """
    axes = [dim] if isinstance(dim, int) else list(dim)
    size_of_axis = {axis: values.shape[axis] for axis in axes}
    sizes = size_of_axis.values()
    if not all(isinstance(size, int) for size in sizes) or all(size == 1 for size in sizes):
        return NotImplemented  # the operator stays

    single = [axis for axis, size in size_of_axis.items() if size == 1]
    return torch.squeeze(values, tuple(single)) if single else values.clone()


def transform_real(values: Tensor, *, dim: Sequence[int], onesided: bool) -> Any:
    """Write the Fourier transform of real *values* as products with constant matrices.

    With *onesided*, the result has only the first half of the last axis of *dim*: the other half
    would be the conjugates of the first.
    """
    if not _have_fixed_sizes(values, dim):
        return NotImplemented  # the operator stays

    # The last axis first, while all values are real; then the other axes, of complex values.
    last = dim[-1]
    real, imaginary = _transform_axis(values, None, last, inverse=False)
    if onesided:
        half = values.shape[last] // 2 + 1
        real = real.narrow(last, 0, half)
        imaginary = imaginary.narrow(last, 0, half)
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

    Along the last axis of *dim*, *values* are the first half only: the other half would be their
    conjugates.
    """
    size = last_dim_size
    if not _have_fixed_sizes(values, dim) or not isinstance(size, int):
        return NotImplemented  # the operator stays

    # Transform all axes but the last one.
    real, imaginary = torch.view_as_real(values).unbind(-1)
    for axis in dim[:-1]:
        real, imaginary = _transform_axis(real, imaginary, axis, inverse=True)

    # Complete the last axis: values 1 to `num_mirrored` occur again as conjugates, in reverse.
    last = dim[-1]
    half = size // 2 + 1
    num_mirrored = size - half
    real = real.narrow(last, 0, half)
    imaginary = imaginary.narrow(last, 0, half)
    if num_mirrored:
        mirrored_real = real.narrow(last, 1, num_mirrored).flip(last)
        mirrored_imaginary = imaginary.narrow(last, 1, num_mirrored).flip(last)
        real = torch.cat([real, mirrored_real], last)
        imaginary = torch.cat([imaginary, -mirrored_imaginary], last)

    result, _ = _transform_axis(real, imaginary, last, inverse=True)
    return result


def _have_fixed_sizes(values: Tensor, dim: Sequence[int]) -> bool:
    return all(isinstance(values.shape[axis], int) for axis in dim)


def _transform_axis(
    real: Tensor, imaginary: Tensor | None, axis: int, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Transform one axis of complex values, without a scaling factor; *imaginary* is None if all are real."""
    moved = None if imaginary is None else imaginary.movedim(axis, -1)
    results = _transform(real.movedim(axis, -1), moved, inverse=inverse)
    return results[0].movedim(-1, axis), results[1].movedim(-1, axis)


def _transform(
    real: Tensor, imaginary: Tensor | None, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Transform the last axis, of size n, by one matrix, or if n is large by transforms of smaller sizes.

    With n = p q, the values are a table of p rows and q columns, row by row. The transform is made
    in three steps (Cooley and Tukey, 1965): transform the columns; multiply the value in row k and
    column j by exp(-2 pi sqrt(-1) j k / n), with *inverse* by its conjugate; transform the rows.
    The result is read column by column.
    """
    size = real.shape[-1]
    root = math.isqrt(size)
    rows = next((count for count in range(root, 1, -1) if size % count == 0), 1)

    # One matrix, also for a large prime number.
    if size <= LARGEST_MATRIX or rows == 1:
        cosines, sines = _waves(size, size, size, inverse=inverse)
        if imaginary is None:
            return real @ cosines, real @ sines
        return real @ cosines - imaginary @ sines, real @ sines + imaginary @ cosines

    # Arrange the values as a table, and transform its columns.
    columns = size // rows
    shape = (*real.shape[:-1], rows, columns)
    real_table = real.reshape(shape)
    imaginary_table = None if imaginary is None else imaginary.reshape(shape)
    real_table, imaginary_table = _transform_axis(
        real_table, imaginary_table, -2, inverse=inverse
    )

    # Multiply by the factors, and transform the rows.
    cosines, sines = _waves(rows, columns, size, inverse=inverse)
    turned_real = real_table * cosines - imaginary_table * sines
    turned_imaginary = real_table * sines + imaginary_table * cosines
    real_table, imaginary_table = _transform(turned_real, turned_imaginary, inverse=inverse)

    # Read the result column by column.
    result_real = real_table.transpose(-1, -2).flatten(-2)
    result_imaginary = imaginary_table.transpose(-1, -2).flatten(-2)
    return result_real, result_imaginary


def _waves(rows: int, columns: int, size: int, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return cos and sin of -2 pi j k / *size*, or of 2 pi j k / *size*, as float32 (*rows*, *columns*)."""
    # j k modulo *size* is exact in integers, and gives the same angle.
    steps = torch.outer(torch.arange(rows), torch.arange(columns)) % size
    angles = steps.double() * ((2 if inverse else -2) * math.pi / size)
    return angles.cos().float(), angles.sin().float()


_TRANSFORMS = [
    f"{kind}fft{axes}" for kind in ("", "i", "r", "ir", "h", "ih") for axes in ("", "2", "n")
]
# Forms for operators that the converter cannot write, or writes in a form that is wrong for some
# values.
DECOMPOSED = {
    # torch's own forms of these transforms call the operators `fft_r2c`, `fft_c2c` and `fft_c2r`.
    **{
        getattr(torch.ops.aten, f"fft_{name}").default: getattr(torch._refs.fft, name)
        for name in _TRANSFORMS
    },
    torch.ops.aten.linalg_vector_norm.default: norm,
    torch.ops.aten.squeeze.dim: squeeze,
    torch.ops.aten.squeeze.dims: squeeze,
    torch.ops.prims.fft_r2c.default: transform_real,
    torch.ops.prims.fft_c2c.default: transform_complex,
    torch.ops.prims.fft_c2r.default: transform_to_real,
    ATTENTION: _attention,
    torch.ops.aten.atan2.default: _atan2,
    torch.ops.aten.expm1.default: _expm1,
    torch.ops.aten.index_put.default: _index_put,
    torch.ops.aten.log1p.default: _log1p,
    torch.ops.aten.log_sigmoid.default: lambda values: -torch.nn.functional.softplus(-values),
    torch.ops.aten.argsort.stable: lambda *args, **options: _sort(*args, **options)[1],
    torch.ops.aten.sort.stable: _sort,
    # The converter writes the stacking operators that follow with a loop over the tensors.
    torch.ops.aten.atleast_1d.Sequence: lambda values: [*map(torch.atleast_1d, values)],
    torch.ops.aten.atleast_2d.Sequence: lambda values: [*map(torch.atleast_2d, values)],
    torch.ops.aten.atleast_3d.Sequence: lambda values: [*map(torch.atleast_3d, values)],
    torch.ops.aten.hstack.default: lambda values: torch.cat(
        [*map(torch.atleast_1d, values)], dim=0 if values[0].dim() < 2 else 1
    ),
    torch.ops.aten.vstack.default: lambda values: torch.cat([*map(torch.atleast_2d, values)]),
    torch.ops.aten.dstack.default: lambda values: torch.cat(
        [*map(torch.atleast_3d, values)], 2
    ),
    torch.ops.aten.column_stack.default: lambda values: torch.cat(
        [value.reshape(-1, 1) if value.dim() < 2 else value for value in values], dim=1
    ),
}


def _is_changed(node: fx.Node) -> bool:
    """Return whether `decompose` changes *node*; `_attention` leaves attention of four axes without a mask."""
    if node.target is not ATTENTION:
        return node.target in DECOMPOSED
    query: Any = node.args[0]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask is not None or query.meta["val"].dim() != 4


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Write the operators in `DECOMPOSED` in a form that the converter knows; *program* does not change.

    Returns *program* itself if none of its operators changes. Their forms, and the converter's form
    of attention, give results with other strides than torch does. A view of them may be impossible,
    so every view becomes a contiguous copy in another shape.
    """
    if not any(map(_is_changed, program.graph.nodes)):
        return program
    decomposed: ExportedProgram = program.run_decompositions(
        {
            **DECOMPOSED,
            torch.ops.aten.view.default: lambda values, shape: (
                torch.ops.aten._unsafe_view.default(
                    values.clone(memory_format=torch.contiguous_format), shape
                )
            ),
        }
    )
    return decomposed
