"""From the certified network to the ONNX that ships: rewrite a copy, capture it, convert it, report."""

from typing import Any, NamedTuple

import onnx
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from sopdeploy.backbones.base import Backbone
from sopdeploy.manifest import BatchRange
from sopdeploy.normalise import Normalise
from sopdeploy.preprocess import Preprocess
from sopdeploy_export.capture import capture_any_batch
from sopdeploy_export.lower_onnx import check, lower
from sopdeploy_export.lowering.centring import centre_by_mean
from sopdeploy_export.lowering.network import Wish, rewrite
from sopdeploy_export.lowering.report import LoweringReport
from sopdeploy_export.program_root import program_root

OBSERVED = 2  # images: the fewest that are a batch


class Certified(NamedTuple):
    """The network that the certificate speaks of, its graph, and that graph as ONNX."""

    network: Backbone
    program: ExportedProgram
    model: onnx.ModelProto


class Lowered(NamedTuple):
    """The rewritten network, its graph, that graph as ONNX in float32, and what was done."""

    network: Backbone
    program: ExportedProgram
    model: onnx.ModelProto
    report: LoweringReport

    def in_other_types(self, network: Backbone, program: ExportedProgram, opset: int) -> "Lowered":
        """Return the same for *network*, a copy of this one with casts, whose graph is *program*."""
        model = lower(program, network.outputs, opset)
        if not self.report.textbook:
            model, _ = centre_by_mean(model)
            check(model, opset)
        report = self.report.model_copy(update={"lowered_root": program_root(program).sha256})
        return Lowered(network, program, model, report)


def lower_by_rules(
    certified: Certified, images: NDArray[Any], preprocess: Preprocess, batch: BatchRange, wish: Wish
) -> Lowered:
    """Return the ONNX model to ship, its graph and the report of the rules; *images* are uint8 probes.

    Where no rule changes the graph the model is the certified one itself. Raises `LoweringError` naming the
    rule and the part where a precondition or a proof fails.
    """
    pixels = Normalise(preprocess)(torch.from_numpy(images[:OBSERVED]))
    rewritten = rewrite(certified.network, pixels, batch, wish)
    program, model = certified.program, certified.model
    if rewritten.changed:
        program = capture_any_batch(rewritten.network, preprocess, batch)
        model = lower(program, certified.network.outputs)
    rules, root = rewritten.rules, program_root(certified.program).sha256
    if wish.rules:
        model, centred = centre_by_mean(model)
        rules += tuple(centred)
        check(model)
    report = LoweringReport(
        textbook=not wish.rules,
        rules=rules,
        choices=rewritten.choices,
        certified_root=root,
        lowered_root=program_root(program).sha256 if rewritten.changed else root,
    )
    return Lowered(rewritten.network, program, model, report)
