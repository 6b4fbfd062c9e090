"""Lowering a certified network: the rules in their order, on a copy, each proved where it is applied.

The certificate speaks of the network as it was trained and detached. Only after it holds is a copy rewritten,
captured anew and written as ONNX; parity then compares the file with the certified network, not with the
copy.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.graph.onnx_export import check, lower
from sopdeploy_export.graph.torch_export import capture_any_batch
from sopdeploy_export.proof.graph_hash import program_root
from sopdeploy_export.rewrites import attention as gsop_centering
from sopdeploy_export.rewrites import attention as position
from sopdeploy_export.rewrites import attention as row_conv
from sopdeploy_export.rewrites import linear as compensation
from sopdeploy_export.rewrites import linear as fusion_norm
from sopdeploy_export.rewrites import mixture as routing
from sopdeploy_export.rewrites import newton_schulz as root
from sopdeploy_export.rewrites import reference_formulas as textbook
from sopdeploy_export.rewrites.autotune import Heuristic, Timed, as_it_is
from sopdeploy_export.rewrites.centering import center_by_mean
from sopdeploy_export.rewrites.context import AppliedRule, Choice, LoweringReport, RewriteContext
from sopdeploy_export.rewrites.equivalence import record_activations

# A mixture goes before the roots: its experts share one.
RULES: tuple[Callable[[RewriteContext], None], ...] = (
    routing.apply,
    root.apply,
    compensation.apply,
    row_conv.apply,
    fusion_norm.apply_of_fusion_norm,
    gsop_centering.apply_of_gsop_centring,
    position.apply_of_position,
)
FORMULAS: tuple[Callable[[RewriteContext], None], ...] = (textbook.apply,)


class LoweringOptions(NamedTuple):
    """What was asked for: the rules or the papers' formulas; forms by the clock or by rule of thumb.

    `stored` is the type of Newton-Schulz's matrices between two products, `cast` what the clock does to a
    form before it times it: the casts that it will ship with.
    """

    rules: bool = True
    autotune: bool = False
    stored: Literal["float32", "float16"] = "float32"
    cast: Callable[[nn.Module], nn.Module] = as_it_is


BY_RULES = LoweringOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """The network to capture, whether its graph is another one than the certified, and what was done."""

    network: Backbone
    changed: bool
    rules: tuple[AppliedRule, ...]
    choices: tuple[Choice, ...]


def rewrite(
    certified: Backbone,
    images: Tensor,
    batch: BatchRange,
    wish: LoweringOptions = BY_RULES,
) -> Rewritten:
    """Return a rewritten copy of *certified*; *images* are two normalised (2, 3, H, W) probe images.

    Raises `LoweringError` where a precondition does not hold or a rewritten part gives other numbers in
    float64.
    """
    network = copy.deepcopy(certified).eval()
    for part in network.modules():
        if isinstance(part, ISqrtCov):
            part.config = part.config.model_copy(update={"stored": wish.stored})
    work = RewriteContext(
        network=network,
        calls=record_activations(network, (images,)),
        batch=batch,
        choose=Timed(batch, wish.cast) if wish.autotune else Heuristic(),
    )
    for apply in RULES if wish.rules else FORMULAS:
        apply(work)
    return Rewritten(
        network=network, changed=work.changed, rules=tuple(work.rules), choices=tuple(work.choices)
    )


OBSERVED = 2  # images: the fewest that are a batch


class CertifiedGraph(NamedTuple):
    """The network that the certificate speaks of, its graph, and that graph as ONNX."""

    network: Backbone
    program: ExportedProgram
    model: onnx.ModelProto


class LoweredGraph(NamedTuple):
    """The rewritten network, its graph, that graph as ONNX in float32, and what was done."""

    network: Backbone
    program: ExportedProgram
    model: onnx.ModelProto
    report: LoweringReport

    def in_other_types(self, network: Backbone, program: ExportedProgram, opset: int) -> "LoweredGraph":
        """Return the same for *network*, a copy of this one with casts, whose graph is *program*."""
        model = lower(program, network.outputs, opset)
        if not self.report.textbook:
            model, _ = center_by_mean(model)
            check(model, opset)
        report = self.report.model_copy(update={"lowered_root": program_root(program).sha256})
        return LoweredGraph(network, program, model, report)


def lower_by_rules(
    certified: CertifiedGraph,
    images: NDArray[Any],
    preprocess: Preprocess,
    batch: BatchRange,
    wish: LoweringOptions,
) -> LoweredGraph:
    """Return the ONNX model to ship, its graph and the report of the rules; *images* are uint8 probes.

    Where no rule changes the graph the model is the certified one itself. Raises `LoweringError` naming the
    rule and the part where a precondition or a proof fails.
    """
    pixels = Normalize(preprocess)(torch.from_numpy(images[:OBSERVED]))
    rewritten = rewrite(certified.network, pixels, batch, wish)
    program, model = certified.program, certified.model
    if rewritten.changed:
        program = capture_any_batch(rewritten.network, preprocess, batch)
        model = lower(program, certified.network.outputs)
    rules, root = rewritten.rules, program_root(certified.program).sha256
    if wish.rules:
        model, centred = center_by_mean(model)
        rules += tuple(centred)
        check(model)
    report = LoweringReport(
        textbook=not wish.rules,
        rules=rules,
        choices=rewritten.choices,
        certified_root=root,
        lowered_root=program_root(program).sha256 if rewritten.changed else root,
    )
    return LoweredGraph(rewritten.network, program, model, report)
