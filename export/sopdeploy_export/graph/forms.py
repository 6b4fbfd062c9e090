"""Forms of operators that torch captures for every batch size, and that ONNX has."""

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from string import ascii_letters
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from sopdeploy_export.state import PythonNumbers
from sopdeploy_export.sums import SUMS

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def simplify_operators(program: ExportedProgram) -> None:
    """Simplify average pooling, `ceil_mode` without effect, and ellipses in `einsum`, in place.

    Average pooling to one position becomes the mean that ATen computes for it. ATen then restores the strides
    of a map in channels-last layout with `as_strided` (AdaptiveAveragePooling.cpp), which torch-tensorrt
    cannot convert, and ONNX needs five operators for it.
    """
    aten = torch.ops.aten
    poolings = (aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d)
    for num_axes, pooling in enumerate(poolings, start=1):
        for node in program.graph.find_nodes(op="call_function", target=pooling.default):
            x, output_size = node.args
            if output_size == [1] * num_axes:
                node.target, node.args = aten.mean.dim, (x, [*range(-1, -1 - num_axes, -1)], True)
    # With `ceil_mode`, ONNX counts windows that begin behind the map, ATen does not.
    for node in program.graph.find_nodes(op="call_function", target=aten.max_pool2d.default):
        if len(node.args) == 6 and node.args[5]:  # the last argument is `ceil_mode`, by default False
            x, kernel, stride, padding, dilation, _ = node.args
            image = torch.empty(x.meta["val"].shape[1:], device="meta")  # (C, H, W)
            floored = aten.max_pool2d(image, kernel, stride, padding, dilation)
            if floored.shape[-2:] == node.meta["val"].shape[-2:]:
                node.args = (x, kernel, stride, padding, dilation)
    # ONNX Runtime does not accept every form of an ellipsis.
    for node in program.graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation, operands = node.args
        if "..." in equation.partition("->")[0]:
            ranks = [operand.meta["val"].ndim for operand in operands]
            node.args = (_label_hidden_axes(equation, ranks), operands)
    program.graph_module.recompile()


def _label_hidden_axes(equation: str, ranks: Sequence[int]) -> str:
    """Replace every "..." by labels: for *ranks* 4 and 3, "...ij,...jk" becomes "baij,ajk->baik"."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # then the result has the labels that occur once, in alphabetical order
        result = "..." + "".join(sorted(x for x in set(terms) - set(",.") if terms.count(x) == 1))
    unused = [letter for letter in ascii_letters if letter not in terms]
    labeled_terms, longest = [], ""
    for term, rank in zip(terms.split(","), ranks, strict=True):
        num_hidden = rank - len(term.replace("...", ""))
        # Reversed, so that the last hidden axis, at which operands are aligned, is always unused[0].
        labels = "".join(reversed(unused[:num_hidden]))
        labeled_terms.append(term.replace("...", labels))
        longest = max(longest, labels, key=len)  # the result has all hidden axes
    return f"{','.join(labeled_terms)}->{result.replace('...', longest)}"


class SymbolicForms(TorchFunctionMode):
    """Replaces functions that torch.export captures for one batch size only, or not at all.

    These are `chunk` and `split` of the batch, as after `cat([x, x.flip(3)])`, and `take_along_dim`. Instance
    norm with running statistics is a batch norm, for which torch would make one image of the whole batch.
    Code that reads tensors of Python numbers gets their values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers = PythonNumbers()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the other form of *function*, if there is one.

        A Python value that is read from a tensor of Python numbers is returned without a call.
        """
        del types
        known_value = self._numbers.compute(function, args, kwargs or {})
        if known_value is not None and not isinstance(known_value, Tensor):
            return known_value
        result = OTHER_FORMS.get(function, function)(*args, **(kwargs or {}))
        self._numbers.remember(result, known_value)
        return result


def _chunk(input: Tensor, chunks: int, dim: int = 0) -> Any:
    """Divide the batch axis into *chunks* of equal size by a view; leave other axes to torch."""
    if is_batch_axis(input, dim) and input.shape[0] % chunks == 0:
        return input.view(chunks, -1, *input.shape[1:]).unbind(0)
    return input.chunk(chunks, dim)


def _split(x: Tensor, size: Any, dim: int = 0) -> Any:
    """Divide the batch axis into parts of *size* images by a view; leave other axes and sizes to torch."""
    if is_batch_axis(x, dim) and not isinstance(size, list | tuple) and x.shape[0] % size == 0:
        return x.view(-1, size, *x.shape[1:]).unbind(0)
    return torch.split(x, size, dim)


def is_batch_axis(x: Tensor, dim: int) -> bool:
    """Return whether *dim* is the first axis of *x*, and *x* no weight."""
    return dim in (0, -x.ndim) and not isinstance(x, nn.Parameter)


def _take_along(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """Compute `take_along_dim` by `gather`, after all axes but *dim* are expanded to common sizes."""
    if dim is None:  # both are flattened
        return torch.take_along_dim(input, indices)
    x, chosen = input.movedim(dim, -1), indices.movedim(dim, -1)  # (..., n) and (..., k)
    shape = torch.broadcast_shapes(x.shape[:-1], chosen.shape[:-1])  # type: ignore[no-untyped-call]
    x, chosen = x.expand(*shape, x.shape[-1]), chosen.expand(*shape, chosen.shape[-1])
    return x.gather(-1, chosen).movedim(-1, dim)


def _instance_norm(*args: Any, **options: Any) -> Tensor:
    """Normalize by running statistics, as a batch norm does, unless each image has its own."""
    named = inspect.signature(F.instance_norm).bind(*args, **options).arguments
    if named.pop("use_input_stats", True):
        return F.instance_norm(*args, **options)
    return F.batch_norm(**named)


OTHER_FORMS: dict[Any, Any] = {  # parameters have torch's names, or are given by position (split)
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
    **dict.fromkeys((torch.split, Tensor.split), _split),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), _take_along),
    F.instance_norm: _instance_norm,
}


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **options: Any
) -> Any:
    """Write attention with a mask by `_masked_attention`, and other than four axes as matrix products.

    `_masked_attention` calls it again, with a mask of numbers. `NotImplemented` leaves the operator as it is.
    """
    if mask is not None and not _handles_mask.get():
        return _masked_attention(query, key, value, mask, *args, **options)
    if query.dim() == 4:
        return NotImplemented
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, *args, **options)[0]


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *args: Any, **options: Any
) -> Any:
    """Write *mask* as numbers that attention adds, 0 or -inf if it is boolean.

    The result of a query that may read nothing is 0, not the NaN of a softmax over -inf alone.
    """
    added, allowed = mask, mask != -torch.inf
    if mask.dtype == torch.bool:
        added, allowed = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf), mask
    token = _handles_mask.set(True)
    try:
        result = ATTENTION(query, key, value, added, *args, **options)  # calls `_attention` again
    finally:
        _handles_mask.reset(token)
    filled = result.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    # The strides stay those of attention, so that a view of the result stays possible.
    axes = sorted(range(result.dim()), key=result.stride, reverse=True)
    return filled.permute(axes).contiguous().permute([axes.index(axis) for axis in range(len(axes))])


# Whether `_attention` is called by `_masked_attention`.
_handles_mask: ContextVar[bool] = ContextVar("_handles_mask", default=False)


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
    """Write the angle of the point (x, y), from -pi to pi, also if a coordinate is 0 or -0."""
    below, left = ((value < 0) | (1 / value < 0) for value in (y, x))  # 1 / -0 is negative
    far = (y.abs() == torch.inf) & (x.abs() == torch.inf)  # then the angle is that of a diagonal
    divisor = torch.where((x == 0) & (y == 0), 1.0, x)
    slope = torch.where(far, y.sign() * x.sign(), y / divisor)
    # This is right for x > 0; left of the y-axis, it is the angle of the opposite point (-x, -y).
    angle = slope.atan()
    half_turn = torch.where(below, -torch.pi, torch.pi)
    return angle + torch.where(left, half_turn, 0.0)


def _sort(values: Tensor, *, dim: int = -1, descending: bool = False, **_stable: bool) -> Any:
    """Write a stable sort as the choice of all elements: `TopK` is stable, and needs no shape at run time."""
    if values.dim() == 0 or not isinstance(values.shape[dim], int):
        return torch.ops.aten.sort.default(values, dim, descending)
    return torch.ops.aten.topk.default(values, values.shape[dim], dim, descending)


def _index_put(
    values: Tensor, indices: Sequence[Tensor | None], new: Tensor, accumulate: bool = False
) -> Tensor:
    """Write x[mask] = number as a choice, because the number of chosen values is no size of a graph."""
    is_mask = len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool
    if not is_mask or new.numel() != 1 or accumulate:
        return NotImplemented  # the operator stays
    mask = cast(Tensor, indices[0])
    return torch.where(mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim())), new.reshape(()), values)


# Operators whose form of the converter is missing, or wrong for some values
DECOMPOSED = {
    **SUMS,
    ATTENTION: _attention,
    torch.ops.aten.atan2.default: _atan2,
    torch.ops.aten.expm1.default: _expm1,
    torch.ops.aten.index_put.default: _index_put,
    torch.ops.aten.log1p.default: _log1p,
    torch.ops.aten.log_sigmoid.default: lambda values: -torch.nn.functional.softplus(-values),
    torch.ops.aten.argsort.stable: lambda *args, **options: _sort(*args, **options)[1],
    torch.ops.aten.sort.stable: _sort,
    # The converter writes these with a loop over the tensors.
    torch.ops.aten.atleast_1d.Sequence: lambda values: [*map(torch.atleast_1d, values)],
    torch.ops.aten.atleast_2d.Sequence: lambda values: [*map(torch.atleast_2d, values)],
    torch.ops.aten.atleast_3d.Sequence: lambda values: [*map(torch.atleast_3d, values)],
    torch.ops.aten.hstack.default: lambda values: torch.cat(
        [*map(torch.atleast_1d, values)], dim=0 if values[0].dim() < 2 else 1
    ),
    torch.ops.aten.vstack.default: lambda values: torch.cat([*map(torch.atleast_2d, values)]),
    torch.ops.aten.dstack.default: lambda values: torch.cat([*map(torch.atleast_3d, values)], 2),
    torch.ops.aten.column_stack.default: lambda values: torch.cat(
        [value.reshape(-1, 1) if value.dim() < 2 else value for value in values], dim=1
    ),
}


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Write the operators in `DECOMPOSED` in a form that the converter knows; *program* does not change.

    The results of these forms, and the converter's of attention, have other strides than those of torch, with
    which a view may be impossible. Every view therefore becomes a contiguous copy in another shape.
    """
    if not any(node.target in DECOMPOSED for node in program.graph.nodes):
        return program
    decomposed: ExportedProgram = program.run_decompositions(
        {
            **DECOMPOSED,
            torch.ops.aten.view.default: lambda values, shape: torch.ops.aten._unsafe_view.default(
                values.clone(memory_format=torch.contiguous_format), shape
            ),
        }
    )
    return decomposed
