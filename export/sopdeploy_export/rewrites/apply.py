"""Rewrite a certified network for export, with a proof of every replacement.

The certificate covers the network as it was trained and detached. Only then is a copy rewritten, captured and
converted to ONNX. The parity check compares the file with the certified network, not with the copy.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.export_hints import export_hints
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.graph.onnx_export import check, lower
from sopdeploy_export.graph.torch_export import capture_any_batch
from sopdeploy_export.proof.graph_hash import program_root
from sopdeploy_export.rewrites import attention, linear, mixture, newton_schulz
from sopdeploy_export.rewrites.autotune import Benchmark
from sopdeploy_export.rewrites.centering import center_by_mean
from sopdeploy_export.rewrites.context import LoweringReport, RewriteContext
from sopdeploy_export.rewrites.equivalence import record_activations
from sopdeploy_export.rewrites.reference_formulas import FORMULAS
from sopdeploy_export.rewrites.reference_formulas import NAME as REFERENCE

OBSERVED_IMAGES = 2  # the smallest batch
Rule = Callable[[RewriteContext, str, Any], None]
# Layers declare rules by these names (`ExportHints.rewrite_rules`). Rules run in this order: mixtures come
# before roots, because the experts of a mixture share one.
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
    """How a network is rewritten.

    Attributes:
        rules: Apply the rewrite rules; otherwise write the papers' formulas.
        autotune: Choose forms by timing them; otherwise by a heuristic.
        stored: Type of the Newton-Schulz matrices between two products.
        cast: Places the casts of the exported precision in a form before it is timed.
    """

    rules: bool = True
    autotune: bool = False
    stored: Literal["float32", "float16"] = "float32"
    cast: Callable[[nn.Module], nn.Module] = lambda form: form


DEFAULT_OPTIONS = LoweringOptions()


def rewrite(
    certified: Backbone, images: Tensor, batch: BatchRange, options: LoweringOptions = DEFAULT_OPTIONS
) -> RewriteContext:
    """Rewrite a copy of *certified*; *images* are normalized probes (2, 3, H, W).

    Raises `LoweringError` if a precondition does not hold, a rewritten part computes something else in
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


def apply_rules(context: RewriteContext) -> None:
    """Apply every rule to the parts that declare it."""
    for part in context.network.modules():
        unknown = set(export_hints(part).rewrite_rules) - RULES.keys()
        if unknown:
            raise LoweringError(f"{type(part).__name__} declares an unknown rewrite rule: {min(unknown)}")
    for name, rule in RULES.items():
        for where, part in context.parts("rewrite_rules", name):
            rule(context, where, part)


def apply_formulas(context: RewriteContext) -> None:
    """Replace every part that declares a reference formula by that formula."""
    for name, build in FORMULAS.items():
        for where, part in context.parts("reference_formula", name):
            context.replace(REFERENCE, where, build)
            shape = "x".join(map(str, context.activations[where].inputs[0].shape[1:]))
            context.report(
                REFERENCE, where, f"{type(part).__name__} of {shape}", "the paper's formula, for comparison"
            )


class CertifiedGraph(NamedTuple):
    """The network that the certificate covers, its program, and that program as ONNX."""

    network: Backbone
    program: ExportedProgram
    model: onnx.ModelProto


class LoweredGraph(NamedTuple):
    """The rewritten network, its program, its float32 ONNX model, and the report."""

    network: Backbone
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

    If no rule changes the program, its ONNX model is the certified one. Raises `LoweringError` with the
    rule and the part for which a precondition or a proof fails.
    """
    pixels = Normalize(preprocess)(torch.from_numpy(images[:OBSERVED_IMAGES]))
    rewritten = rewrite(certified.network, pixels, batch, options)
    program, model = certified.program, certified.model
    if rewritten.changed:
        program = capture_any_batch(rewritten.network, preprocess, batch)
        model = lower(program, certified.network.outputs)
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
    lowered: LoweredGraph, network: Backbone, program: ExportedProgram, opset: int
) -> LoweredGraph:
    """Convert *network*, the lowered one with casts, captured as *program*."""
    model = lower(program, network.outputs, opset)
    if not lowered.report.textbook:
        model, _ = center_by_mean(model)
        check(model, opset)
    report = lowered.report.model_copy(update={"lowered_root": program_root(program).sha256})
    return LoweredGraph(network, program, model, report)
