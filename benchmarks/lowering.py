"""Latency of rewritten layers in ONNX Runtime on one core.

Each layer is exported twice: with the rewrite rules, and as the paper defines it (`--no-lowering`). The
outputs are compared, and both are timed alternately at batch size 1 and 8. Two further cases compare a
mixture that runs K of 16 experts with one that runs all. `ours` is the rewritten layer; `met` is true if
every speed-up reaches its target.

    python benchmarks/lowering.py [--quick] [--json]
"""

import sys
from collections.abc import Callable
from time import process_time
from typing import NamedTuple

import numpy as np
import torch
from measure import Result, compare, parse, report
from torch import Tensor, nn

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.layers.attention.gsop_block import GSoPBlock, GSoPBlockConfig
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import Components, Convolutions, make_components
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.rewrites.apply import apply_formulas, apply_rules, record_activations
from sopdeploy_export.rewrites.context import RewriteContext, open_form
from sopdeploy_export.rewrites.mixture import AllMasked, GatheredWeights

TOLERANCE = 2e-5  # relative to the largest value; both sides are float32


class Case(NamedTuple):
    """A comparison of two equivalent modules, their inputs, and the target speed-up at batch size 1 and 8."""

    name: str
    against: str
    ours: nn.Module
    other: nn.Module
    inputs: Callable[[int], tuple[Tensor, ...]]
    targets: tuple[float, float]


class Parent(nn.Module):
    """A network with a single layer, because rewrite rules replace children of a module."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(*inputs)
        return output


def rewritten(layer: nn.Module, inputs: tuple[Tensor, ...], *, by_rules: bool) -> nn.Module:
    """Rewrite *layer* with the rules, or into the formulas of the papers."""
    network = Parent(layer).eval()
    batch = BatchRange(optimum=8)
    activations = record_activations(network, inputs)
    context = RewriteContext(network=network, activations=activations, batch=batch)
    if by_rules:
        apply_rules(context)
    else:
        apply_formulas(context)
    return network.layer


def features(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a function that creates non-negative random feature maps for a batch size."""
    return lambda batch: (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)).relu(),)


def pooling_case(width: int, side: int, target: float) -> Case:
    """Create the case of iSQRT pooling, from the covariance to the triangle."""
    make_maps = features(width, side, side)
    sides = [rewritten(ISqrtCov(width), make_maps(2), by_rules=lowered) for lowered in (True, False)]
    name = f"iSQRT pooling, d={width}, M={side * side}"
    return Case(name, "paper's loop", sides[0], sides[1], make_maps, (target, target))


def mixture(chosen: int) -> tuple[Components, Callable[[int], tuple[Tensor, ...]]]:
    """Create 16 experts, and a function that creates 8x8 feature maps and weights with *chosen* non-zeros."""
    torch.manual_seed(0)
    experts, _ = make_components(
        "sop", 256, Convolutions((256, 128)), components=16, counted=chosen, root=NewtonSchulzConfig()
    )
    make_maps = features(256, 8, 8)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        logits = torch.randn(batch, 16, generator=torch.Generator().manual_seed(batch))
        return (*make_maps(batch), keep_largest(logits, chosen))

    return experts.eval(), inputs


def mixture_case() -> Case:
    """Create the case of GM-SOP's mixture, 8 of 16 experts, without its gate."""
    sides = []
    for lowered in (True, False):
        experts, inputs = mixture(8)
        sides.append(rewritten(experts, inputs(2), by_rules=lowered))
    return Case("GM-SOP mixture 16-8, 8x8 maps", "paper, all 16", sides[0], sides[1], inputs, (2.5, 2.5))


def routed_case(chosen: int, target: float) -> Case:
    """Create the case of K of 16 experts compared with all 16, both rewritten."""
    experts, inputs = mixture(chosen)
    ours, other = GatheredWeights(experts, chosen).eval(), AllMasked(experts, chosen).eval()
    return Case(f"mixture, K={chosen} of 16", "all 16, rewritten", ours, other, inputs, (target, target))


def gsop_case() -> Case:
    """Create the case of GSoP's channel block with 1024 channels."""
    make_maps = features(1024, 14, 14)
    sides = []
    for lowered in (True, False):
        torch.manual_seed(0)
        sides.append(rewritten(GSoPBlock(GSoPBlockConfig(), 1024, 1), make_maps(2), by_rules=lowered))
    return Case("GSoP block, C=1024", "paper's block", sides[0], sides[1], make_maps, (1.0, 1.0))


def run(case: Case, batch: int, runs: int) -> tuple[Result, float]:
    """Compare the outputs of both sides, then time them at batch size *batch*; also return the target."""
    sessions = [open_form(module, case.inputs(2)) for module in (case.ours, case.other)]
    arrays = [value.numpy() for value in case.inputs(batch)]
    sides = [
        lambda s=session: s.run(None, {g.name: a for g, a in zip(s.get_inputs(), arrays, strict=True)})[0]
        for session in sessions
    ]
    ours, other = sides[0](), sides[1]()
    if np.abs(ours - other).max() > TOLERANCE * np.abs(other).max():
        sys.exit(f"{case.name}: the outputs of both sides differ")
    name = f"{case.name}, batch {batch}"
    result = compare(name, case.against, *sides, runs=runs, warmups=3, clock=process_time)
    return result, case.targets[0 if batch == 1 else 1]


def main() -> None:
    """Time all cases; list those that miss their target."""
    arguments = parse(__doc__)
    torch.set_num_threads(1)
    runs = 11 if arguments.quick else 41
    cases = [
        pooling_case(256, 14, 1.4),
        pooling_case(256, 7, 8.0),
        pooling_case(128, 8, 3.0),
        mixture_case(),
        routed_case(8, 1 / 0.65),
        routed_case(2, 1 / 0.3),
        gsop_case(),
    ]
    jobs = [(case, batch) for case in cases for batch in (1, 8)]
    with torch.no_grad():
        timed = [run(case, batch, runs) for case, batch in jobs]
    missed = [result.case for result, target in timed if result.ratio is None or 1 / result.ratio < target]
    report([result for result, _ in timed], as_json=arguments.json, met=not missed, short=missed)


if __name__ == "__main__":
    main()
