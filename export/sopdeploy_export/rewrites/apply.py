"""Rewrite a certified network for export, with a proof of every replacement.

The certificate covers the network as it was trained and detached. Only then is a copy rewritten, captured
and converted to ONNX. The parity check compares the file with the certified network, not with the copy.

In the ONNX graph, `center_by_mean` replaces products with an n x n constant alpha I + beta 11^T, because X
(alpha I + beta 11^T) = alpha X + beta (X 1) 1^T for any alpha and beta. If alpha + n beta = 0, the rows of
the constant sum to zero and the product is alpha (X - mean(X)). The rule computes alpha + n beta instead of
assuming 0, because the position block of the released GSoP code uses I / P - 11^T / P^2 with n different from
P, which does not center. The product costs n^2 multiply-adds per row of X and stores n^2 numbers in the file;
the sum costs n additions.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.export_hints import export_hints
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.graph import capture_any_batch, check, lower, output_names
from sopdeploy_export.proof.hashes import program_root
from sopdeploy_export.rewrites import attention, linear, mixture, newton_schulz
from sopdeploy_export.rewrites.context import (
    Activation,
    AppliedRule,
    Benchmark,
    LoweringReport,
    RewriteContext,
)
from sopdeploy_export.rewrites.newton_schulz import MIN_SIZE, ROUNDING, Centering
from sopdeploy_export.rewrites.reference_formulas import FORMULAS
from sopdeploy_export.rewrites.reference_formulas import NAME as REFERENCE

OBSERVED_IMAGES = 2  # the smallest batch of several images
Rule = Callable[[RewriteContext, str, Any], None]
# Layers declare rules by these names (`ExportHints.rewrite_rules`). Rules run in this order: mixtures come
# before roots, because the experts of a mixture share one root.
RULES: dict[str, Rule] = {
    "mixture_routing": mixture.apply,
    "newton_schulz": newton_schulz.apply,
    "post_compensation": linear.move_compensation,
    "row_convolution": attention.fold_row_norm,
    "fold_fusion_norm": linear.fold_fusion_norm,
    "centering": attention.report_centering,
    "position_resampling": attention.check_position_resampling,
}


class LoweringOptions(NamedTuple):
    """Options of the rewrite before the conversion to ONNX.

    Attributes:
        rules: Apply the rewrite rules; otherwise write the papers' formulas.
        autotune: Choose forms by timing them; otherwise by a heuristic.
        stored: Type of the Newton-Schulz matrices between two products.
        cast: Places the casts of the exported precision in each form before it is timed.
    """

    rules: bool = True
    autotune: bool = False
    stored: Literal["float32", "float16"] = "float32"
    cast: Callable[[nn.Module], nn.Module] = lambda form: form


DEFAULT_OPTIONS = LoweringOptions()


def rewrite(
    certified: nn.Module, images: Tensor, batch: BatchRange, options: LoweringOptions = DEFAULT_OPTIONS
) -> RewriteContext:
    """Rewrite a copy of *certified*; *images* are normalized probes (2, 3, H, W).

    Raises `LoweringError` if a precondition does not hold, a rewritten part differs from the original in
    float64, or a layer declares an unknown rule.
    """
    network = copy.deepcopy(certified).eval()
    for part in network.modules():
        if "newton_schulz" in export_hints(part).rewrite_rules:
            config: Any = part.config
            part.config = config.model_copy(update={"stored": options.stored})
    context = RewriteContext(
        network=network,
        activations=record_activations(network, (images,)),
        batch=batch,
        benchmark=Benchmark(batch, options.cast) if options.autotune else None,
    )
    if options.rules:
        apply_rules(context)
    else:
        apply_formulas(context)
    return context


def record_activations(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Activation]:
    """Run *network* on *inputs*; record the first call of each part whose inputs and output are tensors."""
    activations: dict[str, Activation] = {}

    def record(name: str, _: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and all(isinstance(value, Tensor) for value in given):
            first = activations.get(name, Activation(inputs=tuple(given), output=output, times=0))
            activations[name] = Activation(inputs=first.inputs, output=first.output, times=first.times + 1)

    handles = [
        part.register_forward_hook(partial(record, name)) for name, part in network.named_modules() if name
    ]
    try:
        with torch.no_grad():
            network(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return activations


def parts_with(context: RewriteContext, hint: str, name: str) -> list[tuple[str, Any]]:
    """List the parts that were called and whose export hint *hint* is or contains *name*."""
    found = []
    for where, part in context.network.named_modules():
        declared = getattr(export_hints(part), hint) or ()
        if where in context.activations and name in (
            declared if isinstance(declared, tuple) else (declared,)
        ):
            found.append((where, part))
    return found


def apply_rules(context: RewriteContext) -> None:
    """Apply every rule to the parts that declare it."""
    for part in context.network.modules():
        unknown = set(export_hints(part).rewrite_rules) - RULES.keys()
        if unknown:
            raise LoweringError(f"{type(part).__name__} declares an unknown rewrite rule: {min(unknown)}")
    for name, rule in RULES.items():
        for where, part in parts_with(context, "rewrite_rules", name):
            rule(context, where, part)


def apply_formulas(context: RewriteContext) -> None:
    """Replace every part that declares a reference formula by that formula."""
    for name, build in FORMULAS.items():
        for where, part in parts_with(context, "reference_formula", name):
            context.replace(REFERENCE, where, build)
            shape = "x".join(map(str, context.activations[where].inputs[0].shape[1:]))
            context.report(
                REFERENCE, where, f"{type(part).__name__} of {shape}", "the paper's formula, for comparison"
            )


class CertifiedGraph(NamedTuple):
    """The network that the certificate covers, its program, and that program as ONNX."""

    network: nn.Module
    program: ExportedProgram
    model: onnx.ModelProto


class LoweredGraph(NamedTuple):
    """The rewritten network, its program, its float32 ONNX model, and the report."""

    network: nn.Module
    program: ExportedProgram
    model: onnx.ModelProto
    report: LoweringReport


def lower_by_rules(
    certified: CertifiedGraph,
    images: NDArray[Any],
    preprocess: Preprocess,
    batch: BatchRange,
    options: LoweringOptions,
) -> LoweredGraph:
    """Rewrite the certified network and convert it to ONNX.

    If no rule changes the program, its ONNX model is the certified one. Raises `LoweringError`
    naming the rule and the module if a precondition or the equivalence check fails.
    """
    pixels = Normalize(preprocess)(torch.from_numpy(images[:OBSERVED_IMAGES]))
    rewritten = rewrite(certified.network, pixels, batch, options)
    program, model = certified.program, certified.model
    if rewritten.changed:
        program = capture_any_batch(rewritten.network, preprocess, batch)
        model = lower(program, output_names(certified.network))
    rules, root = list(rewritten.rules), program_root(certified.program).sha256
    if options.rules:
        model, centered = center_by_mean(model)
        rules += centered
        check(model)
    report = LoweringReport(
        textbook=not options.rules,
        rules=tuple(rules),
        choices=tuple(rewritten.choices),
        certified_root=root,
        lowered_root=program_root(program).sha256 if rewritten.changed else root,
    )
    return LoweredGraph(rewritten.network, program, model, report)


def lower_converted(
    lowered: LoweredGraph, network: nn.Module, program: ExportedProgram, opset: int
) -> LoweredGraph:
    """Convert *program* to ONNX; it captures *network*, the lowered network with casts."""
    model = lower(program, output_names(network), opset)
    if not lowered.report.textbook:
        model, _ = center_by_mean(model)
        check(model, opset)
    report = lowered.report.model_copy(update={"lowered_root": program_root(program).sha256})
    return LoweredGraph(network, program, model, report)


def recognize(matrix: NDArray[np.floating]) -> Centering | None:
    """Find alpha and beta if *matrix* is alpha I + beta 11^T; return `None` for any other matrix."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < MIN_SIZE:
        return None
    exact = matrix.astype(np.float64)
    beta = float(exact[0, 1])
    alpha = float(exact[0, 0]) - beta
    rebuilt = alpha * np.eye(len(exact)) + beta
    if alpha == 0 or np.abs(rebuilt - exact).max() > ROUNDING * np.abs(exact).max():
        return None
    return Centering(alpha, beta, len(exact))


def center_by_mean(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[AppliedRule]]:
    """Copy *model*, replace products with constants alpha I + beta 11^T, and list the replacements.

    Three cases are not replaced: constants with beta = 0 (such as the identity), products with the constant
    on the left, and constants that are not float32, because their rounding hides whether alpha + n beta is 0.
    """
    found = {
        tensor.name: recognize(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
    }
    nodes: list[onnx.NodeProto] = []
    rules: list[AppliedRule] = []
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in model.graph.node:
        known = found.get(node.input[1]) if node.op_type == "MatMul" else None
        if known is None or known.beta == 0:
            nodes.append(node)
            continue
        nodes += _replacement(copy.graph, node, known)
        total = f"alpha + {known.size} beta = {known.alpha + known.size * known.beta:.1g}"
        kind = "the mean is subtracted" if known.removes_the_mean else "not centering: the sum is added"
        rules.append(
            AppliedRule(
                name=newton_schulz.CENTERING,
                where=node.input[1],
                precondition=f"a constant alpha I + beta 11^T; {total}",
                effect=f"{kind}; {known.size**2} multiply-adds per row become {known.size}",
            )
        )
    if rules:
        del copy.graph.node[:]
        copy.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input} | {value.name for value in copy.graph.output}
        kept = [tensor for tensor in copy.graph.initializer if tensor.name in used]
        del copy.graph.initializer[:]
        copy.graph.initializer.extend(kept)
    return copy, rules


def _replacement(graph: onnx.GraphProto, node: onnx.NodeProto, known: Centering) -> list[onnx.NodeProto]:
    """Build nodes for alpha (X - mean) or alpha X + beta sum, with constants."""
    x, out = node.input[0], node.output[0]
    reduced, scaled = f"{out}_reduced", f"{out}_scaled"
    axes, alpha, beta = f"{out}_axes", f"{out}_alpha", f"{out}_beta"
    graph.initializer.append(numpy_helper.from_array(np.array([-1], dtype=np.int64), axes))
    graph.initializer.append(numpy_helper.from_array(np.array(known.alpha, dtype=np.float32), alpha))
    if known.removes_the_mean:
        return [
            helper.make_node("ReduceMean", [x, axes], [reduced], keepdims=1),
            helper.make_node("Sub", [x, reduced], [scaled]),
            helper.make_node("Mul", [scaled, alpha], [out]),
        ]
    graph.initializer.append(numpy_helper.from_array(np.array(known.beta, dtype=np.float32), beta))
    return [
        helper.make_node("ReduceSum", [x, axes], [reduced], keepdims=1),
        helper.make_node("Mul", [reduced, beta], [f"{reduced}_scaled"]),
        helper.make_node("Mul", [x, alpha], [scaled]),
        helper.make_node("Add", [scaled, f"{reduced}_scaled"], [out]),
    ]
