"""Place casts in the network, so that every runtime computes in the same types.

The casts are placed in a copy of the certified network, before its conversion to ONNX. A part
with weights receives its first input in the dtype of its own weights.

- Layers that declare `keep_float32` stay in float32, including their operations without weights:
  covariance, trace, Newton-Schulz, gate, softmax, and means over a feature map.
- Experts multiply maps by their weights in the dtype of the maps, and compute roots and sums in
  float32.
- A local response norm computes in float32, because squares of activations can overflow in float16.
- So does every operator that adds elements of one operand, such as a mean or a norm.
- Everything else is converted to float16, including the classifier. All outputs are float32.

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

from sopdeploy.bundle.logit_ranges import LogitRanges
from sopdeploy.errors import LoweringError, first_line
from sopdeploy.layers.export_hints import export_hints
from sopdeploy_export.capture.deployed import compute_outputs
from sopdeploy_export.capture.program import NETWORK_PREFIX
from sopdeploy_export.network import copy_network
from sopdeploy_export.runs import InFloat64, ReportsFloat32

_Part = TypeVar("_Part", bound=nn.Module)
# ONNX's LayerNormalization adds in float32 (its attribute `stash_type`).
ADDS_IN_FLOAT32 = (torch.ops.aten.layer_norm.default, torch.ops.aten.native_layer_norm.default)
# The elements of a result that `_influences` looks at, by position from 0 to 1: in the middle,
# anywhere, the last one.
ELEMENTS = (0.5, 0.62, 1.0)
FOLD_TOLERANCE = 1e-9  # relative to the largest value; correct folds differ by 1e-15 to 1e-12
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def in_float16(network: _Part, program: ExportedProgram, pixels: Tensor) -> _Part:
    """Copy *network*, which is in eval mode, with folded batch norms, weights in float16 and casts as hooks.

    Parts that `weight_dtypes` lists in float32 stay in it. *program* is the captured network; it
    shows which batch norms fold into the convolution before them. Raises `LoweringError` if
    folding changes the float64 logits of *pixels*, normalized images (P, 3, H, W).
    """
    _check_fold(network, program, pixels)
    # Weights are replaced below, so a copy of all in float32 is not needed.
    converted = copy_network(network, share_weights=True)
    fold_batch_norms(converted, program)

    dtypes = weight_dtypes(converted)
    for name, part in converted.named_modules():
        # Convert its own weights and buffers; integers stay.
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(dtypes[name])
        for buffer_name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, buffer_name, _cast(buffer, dtypes[name]))

        # Cast its first input before each run.
        dtype = _input_dtype(part, dtypes[name])
        if dtype is not None:
            part.register_forward_pre_hook(partial(_cast_first_input, dtype), with_kwargs=True)

        # Cast the output of parts that compute in float32 in the midst of layers in float16.
        if export_hints(part).output_in_network_dtype or isinstance(part, nn.LocalResponseNorm):
            part.register_forward_hook(
                lambda _part, _inputs, output: _cast(output, torch.float16)
            )

    return converted.eval()


def _check_fold(network: nn.Module, program: ExportedProgram, pixels: Tensor) -> None:
    """Raise `LoweringError` if `fold_batch_norms` changes the float64 logits of *network* for *pixels*.

    *program*, the captured network, says which batch norms are folded. Rounding in float64 is
    allowed (`FOLD_TOLERANCE`). Later comparisons would miss a wrong fold, because their
    tolerance is a multiple of the error of the folded network. Without batch norms, nothing is folded.
    """
    if not program.graph.find_nodes(op="call_function", target=BATCH_NORM):
        return
    exact = copy_network(network).double()

    # `InFloat64` computes in float64 also where code casts to float32. With `ReportsFloat32`, the
    # code reads the dtype that it usually reads.
    with torch.no_grad(), ReportsFloat32(), InFloat64():  # type: ignore[no-untyped-call]
        expected = compute_outputs(exact, pixels.double())[0]
        fold_batch_norms(exact, program)  # in place
        logits = compute_outputs(exact, pixels.double())[0]

    # A class that a large number masks would hide a change of the others.
    is_ordinary_C = torch.from_numpy(LogitRanges.of(expected.numpy()).is_ordinary)
    expected, logits = expected[:, is_ordinary_C], logits[:, is_ordinary_C]
    scale = max(float(expected.abs().max()), torch.finfo(torch.float64).tiny)  # not 0
    difference = float((logits - expected).abs().max()) / scale
    if not difference <= FOLD_TOLERANCE:  # also if it is NaN
        raise LoweringError(
            "batch norms folded into the convolutions change the output by "
            f"{difference:.2g} of its largest value in float64; nothing was "
            "written; choose precision fp32"
        )


def sum_in_float32(program: ExportedProgram, images: Tensor) -> ExportedProgram:
    """Compute the sums of *program* over float16 values in float32, as ATen does but not every runtime.

    For example, the sum of 10,000 values of 60 / 9 exceeds the largest number of float16, although
    their mean does not. A run of *program* on uint8 *images* (B, H, W, 3) shows which of its
    operators add. Returns a changed copy. Raises `LoweringError` if an operator cannot run in float16.
    """
    sums = _Sums(program.module(check_guards=False))
    try:
        sums.run(images)
    except RuntimeError as error:  # such as a constant that is too large, which masks a class
        raise LoweringError(
            f"cannot run in float16: {first_line(error)}; choose precision fp32"
        ) from error

    forms = {
        operator: partial(_in_float32, operator)
        for operator, adds in sums.adds_elements.items()
        if adds
    }
    summed: ExportedProgram = program.run_decompositions(forms)
    return summed


class _Sums(fx.Interpreter):
    """Runs a program and finds out which of its operators add several elements of a float16 operand.

    `adds_elements` maps operators to the answer: False for elementwise ones and `ADDS_IN_FLOAT32`,
    for others that of the function `adds_elements`. Operators of which no call told it are missing.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.adds_elements: dict[OpOverload, bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Decide whether the operator of one node adds elements; run the node, in float32 if it does."""
        if not isinstance(n.target, OpOverload) or not n.users:  # an assertion has no users
            return super().run_node(n)

        # Decide about its operator, unless an earlier node with it did.
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if torch.Tag.pointwise in n.target.tags or n.target in ADDS_IN_FLOAT32:
            self.adds_elements[n.target] = False
        elif n.target not in self.adds_elements:
            adds = adds_elements(n.target, args, kwargs)
            if adds is not None:
                self.adds_elements[n.target] = adds

        # In float32, because CPUs have no float16 form of some operators that add.
        if self.adds_elements.get(n.target):
            result = _in_float32(n.target, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return super().run_node(n)


def adds_elements(
    operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool | None:
    """Tell whether *operator* adds elements of its first operand, in float16, and of no other one.

    - True for a sum, such as a mean or a norm.
    - False for a product, such as a convolution or attention, which adds products of elements of
      two operands: runtimes accumulate it in float32.
    - None if the call does not tell: the first operand is not in float16, or with these sizes, each
      element of the result depends on a single one of its elements, as in a maximum or a copy.
    """
    if not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.float16:
        return None
    random = torch.Generator().manual_seed(0)

    def positive(x: Tensor) -> Tensor:
        """Return float32 values in [0.5, 1.5) in place of a floating-point operand; integers stay."""
        return torch.rand(x.shape, generator=random) + 0.5 if x.is_floating_point() else x

    # New operands of the same shapes, in float32, for which derivatives are computed.
    float32_args, float32_kwargs = tree_map_only(Tensor, positive, (tuple(args), dict(kwargs)))
    leaves = tree_leaves((float32_args, float32_kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    operands = [tensor for tensor in tensors if tensor.is_floating_point()]

    # Count for all operands, or for the first one: some operators have no derivatives for others,
    # such as running statistics.
    try:
        counts = _influences(operator, float32_args, float32_kwargs, operands)
    except RuntimeError:
        counts = _influences(operator, float32_args, float32_kwargs, operands[:1])
    if counts is None:
        return None
    return all(count <= 1 for count in counts[1:])


def _influences(
    operator: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    operands: Sequence[Tensor],
) -> list[int] | None:
    """Count how many elements of each of *operands* influence one element of the first result.

    An element has influence if the derivative by it is not 0. The elements `ELEMENTS` of the result
    are tried in turn, until one is influenced by several elements of the first operand. Returns
    None if there is no such element, or no derivative.

    *operands* are among the arguments. Afterwards, they require gradients, and other arguments do
    not.
    """
    # Derivatives are computed by *operands* only.
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            leaf.requires_grad_(any(leaf is operand for operand in operands))

    with torch.enable_grad():
        leaves = tree_leaves(operator(*args, **kwargs))
        results = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not results or not results[0].requires_grad or not results[0].numel():
            return None

        # The derivatives of single elements of the result by all elements of each operand.
        elements = results[0].flatten()
        for share in ELEMENTS:
            element = elements[round(share * (len(elements) - 1))]
            gradients = torch.autograd.grad(
                element, operands, retain_graph=True, allow_unused=True
            )
            counts = [
                0 if gradient is None else int(gradient.count_nonzero())
                for gradient in gradients
            ]
            if counts[0] > 1:
                return counts

    return None


def _in_float32(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute *operator* in float32 and return its results in float16.

    If the first operand is not in float16, returns `NotImplemented`: the operator stays as it is.
    """
    if args[0].dtype != torch.float16:
        return NotImplemented
    float32_args, float32_kwargs = tree_map_only(
        Tensor, lambda x: _cast(x, torch.float32), (args, kwargs)
    )
    results = operator(*float32_args, **float32_kwargs)
    return tree_map_only(Tensor, lambda x: _cast(x, torch.float16), results)


def _input_dtype(part: nn.Module, weight_dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype that *part* needs its first input in; None if it accepts every dtype.

    *weight_dtype* is the dtype of the weights and floating-point buffers of its own, if it has any.
    """
    # It computes in the dtype of its weights, also of those in a list of parameters.
    tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
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
    """Map the name of every part to the dtype of its own weights in precision fp16.

    The network itself has float16. A part of it has the dtype of its parent, unless it keeps float32
    or its parent lists it as a low-precision child.
    """
    names_in_float32 = set(float32_parts(network))
    dtypes: dict[str, torch.dtype] = {}

    for name, _ in network.named_modules():  # parents come before their children
        parent, _, child = name.rpartition(".")
        hints_of_parent = export_hints(network.get_submodule(parent))
        if name in names_in_float32:
            dtypes[name] = torch.float32
        elif not name or child in hints_of_parent.low_precision_children:
            dtypes[name] = torch.float16
        else:
            dtypes[name] = dtypes[parent]
    return dtypes


def float32_parts(network: nn.Module) -> list[str]:
    """List the names of the parts of *network* that stay in float32 in reduced precisions."""
    # BatchNorm1d mostly reads second-order features, which are in float32. In LocalResponseNorm,
    # squares can overflow.
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
    """Return *inputs* and *keywords* of a part, as its forward pre-hook, with the first value cast to *dtype*."""
    if inputs:
        return (_cast(inputs[0], dtype), *inputs[1:]), keywords
    first = dict(islice(keywords.items(), 1))
    return inputs, {**keywords, **{name: _cast(value, dtype) for name, value in first.items()}}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast *value* to *dtype* if it is a floating-point tensor; return anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return value
    return value.to(dtype)


def fold_batch_norms(network: nn.Module, program: ExportedProgram) -> None:
    """Fold batch norms of *network* into its convolutions, in place.

    A batch norm is folded if it alone reads the output of a convolution, and both run once, as
    *program*, the captured network, shows. The convolution must be an `nn.Conv2d`; the batch norm an
    `nn.BatchNorm2d`, of no subclass but timm's `BatchNormAct2d`, whose activation stays in its place.
    """
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    for node in program.graph.find_nodes(op="call_function", target=BATCH_NORM):
        pair = _foldable_pair(node, names)
        if pair is None:
            continue
        convolution_name, norm_name = pair
        convolution = network.get_submodule(convolution_name)
        norm = network.get_submodule(norm_name)

        # What remains in its place. A batch norm of another class can compute anything, so it stays.
        if type(norm) is nn.BatchNorm2d:
            after_norm: nn.Module = nn.Identity()
        elif isinstance(norm, nn.BatchNorm2d) and type(norm).__name__ == "BatchNormAct2d":
            after_norm = nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
        else:
            continue

        if isinstance(convolution, nn.Conv2d):
            fold_norm(convolution, norm)
            owner, _, attribute = norm_name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, after_norm)


def _foldable_pair(norm: fx.Node, names: Mapping[str, str]) -> tuple[str, str] | None:
    """Name the convolution and the batch norm that can be folded; *norm* is the node of the batch norm.

    *names* maps the inputs of the program to tensors of the network. Returns None if *norm* reads no
    convolution or has no weight, if one of the two runs twice, if something else reads the output
    of the convolution or a weight, or if a weight is computed.
    """
    convolved: Any = norm.args[0]
    norm_weight: Any = norm.args[1]
    if convolved.target not in _CONVOLUTIONS or norm_weight is None:
        return None

    # Nothing else may read the output of the convolution. A weight that several nodes read is that
    # of a layer that runs twice, or is shared.
    weight = convolved.args[1]
    if any(len(value.users) != 1 for value in (convolved, weight, norm_weight)):
        return None
    if weight.name not in names or norm_weight.name not in names:
        return None

    convolution_name, norm_name = (
        names[value.name].removeprefix(NETWORK_PREFIX).rpartition(".")[0]
        for value in (weight, norm_weight)
    )
    return convolution_name, norm_name


@torch.no_grad()
def fold_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold *norm* into *convolution*, in place: (W x + b - mean) * scale + shift becomes one convolution."""
    # In float64; one scale per output channel.
    mean = norm.get_buffer("running_mean")
    variance = norm.get_buffer("running_var")
    scale = norm.weight.double() / torch.sqrt(variance.double() + norm.eps)
    kernel = convolution.weight.double() * scale[:, None, None, None]
    bias_before = 0.0 if convolution.bias is None else convolution.bias.double()
    bias = (bias_before - mean.double()) * scale + norm.bias.double()

    # Rounded once, to the type of the convolution.
    dtype = convolution.weight.dtype
    convolution.weight = nn.Parameter(kernel.to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
