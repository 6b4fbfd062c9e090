"""Place casts in the network, so that every runtime computes in the same types.

The casts are placed in a copy of the certified network, before its conversion to ONNX. A part
with weights receives its inputs in the dtype of its own weights. Layers that declare
`keep_float32` stay in float32, including their operations without weights: covariance, trace,
Newton-Schulz, gate, softmax, and means over a feature map. Experts multiply maps by their
weights in the dtype of the maps, and compute roots and sums in float32. A local response norm
also computes in float32, because squares of activations overflow in float16, and so does every
operator that adds elements of one operand, such as a mean or a norm. Everything else is
converted to float16, including the classifier; all outputs are float32.

Before the casts, batch norms are folded in float64 into the convolutions before them: y = s (W
x) + t is the convolution (s W) x + t. Rounding the weights once, after folding, is more
accurate than the ONNX converter, which folds weights that are already rounded. A batch norm is
folded only if the captured program shows that nothing else reads the output of the convolution,
and that both run once.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from sopdeploy.errors import LoweringError
from sopdeploy.layers.export_hints import export_hints
from sopdeploy_export.capture.deployed import compute_outputs
from sopdeploy_export.capture.program import NETWORK_PREFIX
from sopdeploy_export.network import copy_network
from sopdeploy_export.runs import InFloat64, ReportsFloat32

_Part = TypeVar("_Part", bound=nn.Module)
# ONNX's LayerNormalization adds in float32 (its attribute `stash_type`).
ADDS_IN_FLOAT32 = (torch.ops.aten.layer_norm.default, torch.ops.aten.native_layer_norm.default)
# of a result, as shares of their number: in the middle, anywhere, the last one
ELEMENTS = (
    0.5,
    0.62,
    1.0,
)
FOLD_TOLERANCE = 1e-9  # relative to the largest value; correct folds differ by 1e-15 to 1e-12
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def in_float16(network: _Part, program: ExportedProgram, pixels: Tensor) -> _Part:
    """Copy *network*, which is in eval mode, with folded batch norms, weights in float16 and casts as hooks.

    *program* is the captured network; it shows which batch norms fold into the convolution
    before them. Raises `LoweringError` if folding changes the float64 logits of *pixels*,
    normalized images (P, 3, H, W). Later comparisons would miss a wrong fold, because their
    tolerance is a multiple of this copy's error.
    """
    exact = copy_network(network).double()

    # `InFloat64` computes in float64; `ReportsFloat32` shows the network's code the dtype it
    # usually gets.
    with torch.no_grad(), ReportsFloat32(), InFloat64():  # type: ignore[no-untyped-call]
        expected = compute_outputs(exact, pixels.double())[0]
        fold_batch_norms(exact, program)
        logits = compute_outputs(exact, pixels.double())[0]
    scale = max(float(expected.abs().max()), torch.finfo(torch.float64).tiny)  # not 0
    difference = float((logits - expected).abs().max()) / scale
    if not difference <= FOLD_TOLERANCE:  # also if it is NaN
        raise LoweringError(
            f"batch norms folded into the convolutions change the output by {difference:.2g} of its largest "
            "value in float64; nothing was written; choose precision fp32"
        )
    cast = copy_network(network)
    fold_batch_norms(cast, program)
    dtypes = weight_dtypes(cast)
    for name, part in cast.named_modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(dtypes[name])
        for buffer_name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, buffer_name, _cast(buffer, dtypes[name]))
        dtype = _input_dtype(part, dtypes[name])
        if dtype is not None:
            part.register_forward_pre_hook(partial(_cast_first_input, dtype), with_kwargs=True)

        # These parts compute in float32, and the layers that follow them in float16.
        if export_hints(part).output_in_network_dtype or isinstance(part, nn.LocalResponseNorm):
            part.register_forward_hook(
                lambda _part, _inputs, output: _cast(output, torch.float16)
            )
    return cast.eval()


def sum_in_float32(program: ExportedProgram, images: Tensor) -> ExportedProgram:
    """Compute the sums of *program* over float16 values in float32, as ATen does and not every runtime.

    The sum of 10,000 values of 60 / 9 exceeds the largest number of float16, although their
    mean does not. *program* runs on uint8 *images* (B, H, W, 3) to find its operators that add.
    """
    sums = _Sums(program.module(check_guards=False))
    sums.run(images)
    adding = [operator for operator, adds in sums.adds_elements.items() if adds]
    table = {operator: partial(_in_float32, operator) for operator in adding}
    summed: ExportedProgram = program.run_decompositions(table)
    return summed


class _Sums(fx.Interpreter):
    """Runs a program and finds out which of its operators add several elements of a float16 operand.

    `adds_elements` has the answer for each operator that could be decided.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.adds_elements: dict[OpOverload, bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, in float32 if its operator adds elements, which is decided if it is not known."""
        if not isinstance(n.target, OpOverload) or not n.users:  # an assertion has no users
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if torch.Tag.pointwise in n.target.tags or n.target in ADDS_IN_FLOAT32:
            self.adds_elements[n.target] = False
        elif n.target not in self.adds_elements:
            adds = adds_elements(n.target, args, kwargs)
            if adds is not None:
                self.adds_elements[n.target] = adds
        # in float32 also because CPUs have no float16 form of some
        if self.adds_elements.get(n.target):
            result = _in_float32(n.target, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return super().run_node(n)


def adds_elements(
    operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool | None:
    """Return whether *operator* adds elements of its first operand, in float16, without those of another one.

    An element of a sum has derivatives with respect to several elements of one operand. One of
    a product, such as a convolution or attention, has some with respect to several elements of
    two operands: runtimes accumulate it in float32. None: each element depends on a single one,
    as that of a maximum or a copy, at least with these sizes.
    """
    if not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.float16:
        return None
    random = torch.Generator().manual_seed(0)

    def positive(x: Tensor) -> Tensor:
        """Return values in [0.5, 1.5) in place of a floating-point operand; integers stay."""
        return torch.rand(x.shape, generator=random) + 0.5 if x.is_floating_point() else x

    wide, named = tree_map_only(Tensor, positive, (tuple(args), dict(kwargs)))
    leaves = [leaf for leaf in tree_leaves((wide, named)) if isinstance(leaf, Tensor)]
    operands = [leaf for leaf in leaves if leaf.is_floating_point()]
    try:
        return _adds_by_derivatives(operator, wide, named, operands)
    except (
        RuntimeError
    ):  # some operators have no derivatives of all operands, such as running statistics
        return _adds_by_derivatives(operator, wide, named, operands[:1])


def _adds_by_derivatives(
    operator: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    operands: Sequence[Tensor],
) -> bool | None:
    """Decide as `adds_elements` does, by the derivatives with respect to *operands* among the arguments."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            leaf.requires_grad_(any(leaf is operand for operand in operands))
    with torch.enable_grad():
        results = [
            leaf for leaf in tree_leaves(operator(*args, **kwargs)) if isinstance(leaf, Tensor)
        ]
        if not results or not results[0].requires_grad or not results[0].numel():
            return None
        elements = results[0].flatten()
        for share in ELEMENTS:
            element = elements[round(share * (len(elements) - 1))]
            gradients = torch.autograd.grad(
                element, operands, retain_graph=True, allow_unused=True
            )

            # So many elements of each operand have an influence on this element of the result.
            first, *others = (
                0 if gradient is None else int(gradient.count_nonzero())
                for gradient in gradients
            )
            if first > 1:
                return all(count <= 1 for count in others)
    return None


def _in_float32(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute *operator* in float32 and return its results in float16.

    Returns `NotImplemented`, which keeps the operator as it is, if the first operand is not in
    float16.
    """
    if args[0].dtype != torch.float16:
        return NotImplemented
    wide, named = tree_map_only(Tensor, lambda x: _cast(x, torch.float32), (args, kwargs))
    return tree_map_only(Tensor, lambda x: _cast(x, torch.float16), operator(*wide, **named))


def _input_dtype(part: nn.Module, weight_dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype that *part* needs its first input in; None if it accepts every dtype.

    A part with weights or floating-point buffers of its own computes in their dtype,
    *weight_dtype*.
    """
    tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    # of its own weights
    has_lists = any(isinstance(child, nn.ParameterList) for child in part.children())
    if has_lists or any(tensor.is_floating_point() for tensor in tensors):
        return weight_dtype
    if isinstance(part, nn.LocalResponseNorm):  # squares of activations can overflow in float16
        return torch.float32
    hints = export_hints(part)
    if any(hasattr(part, child) for child in hints.low_precision_children):
        return None  # such a child, a convolution in float16, receives the input
    return torch.float32 if hints.cast_inputs else None


def weight_dtypes(network: nn.Module) -> dict[str, torch.dtype]:
    """Map the name of every part to the dtype of its own weights in fp16.

    A part has the dtype of its parent, unless it keeps float32 or its parent lists it as a
    low-precision child.
    """
    kept = set(float32_parts(network))
    dtypes: dict[str, torch.dtype] = {}
    for name, _ in network.named_modules():  # parents come before their children
        parent, _, child = name.rpartition(".")
        if name in kept:
            dtypes[name] = torch.float32
        elif (
            name == ""
            or child in export_hints(network.get_submodule(parent)).low_precision_children
        ):
            dtypes[name] = torch.float16
        else:
            dtypes[name] = dtypes[parent]
    return dtypes


def float32_parts(network: nn.Module) -> list[str]:
    """List the names of the parts of *network* that stay in float32 in reduced precisions."""
    # BatchNorm1d mostly reads second-order features, in float32; squares in LocalResponseNorm
    # can overflow.
    types = (nn.BatchNorm1d, nn.LocalResponseNorm)
    parts = network.named_modules()
    return [
        name
        for name, part in parts
        if isinstance(part, types) or export_hints(part).keep_float32
    ]


def _cast_first_input(
    dtype: torch.dtype, _part: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return *inputs* and *keywords* of a part, as a hook in front of it, with the first cast to *dtype*."""
    if inputs:
        return (_cast(inputs[0], dtype), *inputs[1:]), keywords
    first = dict(islice(keywords.items(), 1))
    return inputs, {**keywords, **{name: _cast(value, dtype) for name, value in first.items()}}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast *value* to *dtype* if it is a floating-point tensor; return anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return value
    return value.to(dtype)


def fold_batch_norms(network: nn.Module, program: ExportedProgram) -> int:
    """Fold the batch norms of *network* into its convolutions, in place; return the number of folds."""
    signature = program.graph_signature
    num_folds = 0
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.target is not BATCH_NORM:
            continue
        convolved, norm_weight = node.args[:2]  # the input and the weight of the batch norm
        if convolved.target not in _CONVOLUTIONS or norm_weight is None:
            continue
        weight = convolved.args[1]
        if any(len(value.users) != 1 for value in (convolved, weight, norm_weight)):
            continue  # it runs twice, or something else reads its output or weights
        if weight.name not in names or norm_weight.name not in names:
            continue  # a weight is computed
        convolution_name, norm_name = (
            names[value.name].removeprefix(NETWORK_PREFIX).rpartition(".")[0]
            for value in (weight, norm_weight)
        )
        convolution = network.get_submodule(convolution_name)
        norm = network.get_submodule(norm_name)
        if type(norm) is nn.BatchNorm2d:
            after_norm: nn.Module = nn.Identity()
        elif (
            isinstance(norm, nn.BatchNorm2d) and type(norm).__name__ == "BatchNormAct2d"
        ):  # of timm
            after_norm = nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
        else:  # an unknown class can compute anything
            continue
        if isinstance(convolution, nn.Conv2d):
            fold_norm(convolution, norm)
            owner, _, attribute = norm_name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, after_norm)
            num_folds += 1
    return num_folds


@torch.no_grad()
def fold_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold *norm*, (W x + b - mean) * scale + shift, into the weights and bias of *convolution*, in place."""
    mean = norm.get_buffer("running_mean")
    variance = norm.get_buffer("running_var")
    scale = norm.weight.double() / torch.sqrt(variance.double() + norm.eps)
    bias_before = 0.0 if convolution.bias is None else convolution.bias.double()
    bias = (bias_before - mean.double()) * scale + norm.bias.double()
    kernel = convolution.weight.double() * scale[:, None, None, None]
    convolution.weight = nn.Parameter(kernel.to(convolution.weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(convolution.weight.dtype), requires_grad=False)
