"""What do the lowering rules buy in ONNX Runtime on one core?

Each part is exported twice, by the rules and as the papers write it (`--no-lowering`), both are checked to
give the same numbers, and both are timed in turn at batch 1 and 8. The last rows compare a mixture that
runs K of 16 experts with one that runs all. `ours` is the lowered form; `met` says whether the project's
promises hold.

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
from sopdeploy.layers.mixture.components import Components, make_components
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.rewrites.apply import apply_formulas, apply_rules
from sopdeploy_export.rewrites.autotune import open_form
from sopdeploy_export.rewrites.context import RewriteContext
from sopdeploy_export.rewrites.equivalence import record_activations
from sopdeploy_export.rewrites.mixture import AllMasked, GatheredWeights

AGREEMENT = 2e-5  # of the largest value, float32 against float32


class Case(NamedTuple):
    """A comparison: two modules of one answer, what they take, and the speed-up promised at batch 1 and 8."""

    name: str
    against: str
    ours: nn.Module
    other: nn.Module
    inputs: Callable[[int], tuple[Tensor, ...]]
    promised: tuple[float, float]


class Part(nn.Module):
    """A part with a name, so that the rules can put another in its place."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Tensor) -> Tensor:
        answer: Tensor = self.part(*inputs)
        return answer


def rewritten(part: nn.Module, inputs: tuple[Tensor, ...], *, by_rules: bool) -> nn.Module:
    """Return *part* rewritten by the rules, or as the papers write it."""
    network = Part(part).eval()
    batch = BatchRange(optimum=8)
    activations = record_activations(network, inputs)
    context = RewriteContext(network=network, activations=activations, batch=batch)
    if by_rules:
        apply_rules(context)
    else:
        apply_formulas(context)
    return network.part


def features(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a maker of rectified random maps."""
    return lambda batch: (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)).relu(),)


def pooling_case(width: int, side: int, promised: float) -> Case:
    """Return iSQRT pooling, covariance to triangle."""
    made = features(width, side, side)
    both = [rewritten(ISqrtCov(width), made(2), by_rules=lowered) for lowered in (True, False)]
    name = f"iSQRT pooling, d={width}, M={side * side}"
    return Case(name, "textbook loop", both[0], both[1], made, (promised, promised))


def mixture(chosen: int, *, channels: int = 256) -> tuple[Components, Callable[[int], tuple[Tensor, ...]]]:
    """Return 16 experts, and a maker of 8x8 maps with weights of which *chosen* are not 0."""
    torch.manual_seed(0)
    bank, _ = make_components(
        "sop", channels, (256, 128), components=16, counted=chosen, root=NewtonSchulzConfig()
    )
    maps = features(channels, 8, 8)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        logits = torch.randn(batch, 16, generator=torch.Generator().manual_seed(batch))
        return (*maps(batch), keep_largest(logits, chosen))

    return bank.eval(), inputs


def mixture_case() -> Case:
    """Return GM-SOP's mixture, 8 of 16, without its gate."""
    both = []
    for lowered in (True, False):
        bank, inputs = mixture(8)
        both.append(rewritten(bank, inputs(2), by_rules=lowered))
    return Case("GM-SOP mixture 16-8, 8x8 maps", "textbook, all 16", both[0], both[1], inputs, (2.5, 2.5))


def routed_case(chosen: int, promised: float) -> Case:
    """Return K of 16 experts against all 16, both lowered."""
    bank, inputs = mixture(chosen)
    ours, other = GatheredWeights(bank, chosen).eval(), AllMasked(bank, chosen).eval()
    return Case(f"mixture, K={chosen} of 16", "all 16, lowered", ours, other, inputs, (promised, promised))


def gsop_case() -> Case:
    """Return GSoP's channel block on 1024 channels: not slower at batch 1, faster at 8, in one bundle."""
    made = features(1024, 14, 14)
    both = []
    for lowered in (True, False):
        torch.manual_seed(0)
        both.append(rewritten(GSoPBlock(GSoPBlockConfig(), 1024, 1), made(2), by_rules=lowered))
    return Case("GSoP block, C=1024", "textbook block", both[0], both[1], made, (1.0, 1.0))


def run(case: Case, batch: int, runs: int) -> tuple[Result, float]:
    """Time *case* at *batch* after checking that both sides agree; return what was promised too."""
    sessions = [open_form(module, case.inputs(2)) for module in (case.ours, case.other)]
    arrays = [value.numpy() for value in case.inputs(batch)]
    sides = [
        lambda s=session: s.run(None, {g.name: a for g, a in zip(s.get_inputs(), arrays, strict=True)})[0]
        for session in sessions
    ]
    ours, other = sides[0](), sides[1]()
    if np.abs(ours - other).max() > AGREEMENT * np.abs(other).max():
        sys.exit(f"{case.name}: both sides must give the same numbers")
    name = f"{case.name}, batch {batch}"
    result = compare(name, case.against, *sides, runs=runs, warmups=3, clock=process_time)
    return result, case.promised[0 if batch == 1 else 1]


def main() -> None:
    """Time all cases; `met` says whether every promise holds."""
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
    short = [result.case for result, promised in timed if 1 / result.ratio < promised]
    report([result for result, _ in timed], as_json=arguments.json, met=not short, short=short)


if __name__ == "__main__":
    main()
