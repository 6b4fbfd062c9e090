"""Latency of exported layers in ONNX Runtime on one core.

Each layer is exported as the paper defines it, and as the exporter captures it. The outputs are compared, and
both forms are timed alternately at batch size 1 and 8. Two further cases compare a mixture that runs K of 16
experts with one that runs all. `ours` is the exported layer; `met` is true if every speed-up reaches its
target.

    python benchmarks/lowering.py [--quick] [--json]
"""

import sys
from collections.abc import Callable
from time import process_time
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from measure import Result, compare, parse, report
from torch import Tensor, nn
from torch.export import Dim

from sopdeploy.layers.covariance import covariance_trace
from sopdeploy.layers.gsop_block import ChannelAttention, GSoPBlock, GSoPBlockConfig, RowConv
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, ISqrtCov
from sopdeploy.layers.mixture import Components, Convolutions, keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.graph import convert

TOLERANCE = 2e-5  # relative to the largest value; both sides are float32


class Case(NamedTuple):
    """Two equivalent graphs, their inputs, and the target speed-up at batch size 1 and 8."""

    name: str
    against: str
    ours: onnx.ModelProto
    other: onnx.ModelProto
    inputs: Callable[[int], tuple[Tensor, ...]]
    targets: tuple[float, float]


def covariance_of_the_paper(x_BdM: Tensor) -> Tensor:
    """Compute X (I / M - 11^T / M^2) X^T."""
    m = x_BdM.shape[2]
    return x_BdM @ (torch.eye(m) / m - torch.ones(m, m) / m**2) @ x_BdM.transpose(1, 2)


class RootOfThePaper(nn.Module):
    """`ISqrtCov`, computed with the loop of the paper (iSQRT-COV, Eq. 4)."""

    def __init__(self, before: ISqrtCov) -> None:
        super().__init__()
        self.config, self.triangle = before.config, before.triangle

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute the upper triangle (B, d (d + 1) / 2), row by row."""
        cov_Bdd = covariance_of_the_paper(features_BdHW.flatten(start_dim=2))
        norm = covariance_trace(cov_Bdd).clamp_min(SMALLEST_NORM)
        identity = torch.eye(cov_Bdd.shape[1])
        y, z = cov_Bdd / norm, identity.expand_as(cov_Bdd)
        for _ in range(self.config.iterations):
            t = 0.5 * (3.0 * identity - z @ y)
            y, z = y @ t, t @ z
        return (y * norm.sqrt()).flatten(start_dim=1).index_select(1, self.triangle)


class ChannelAttentionOfThePaper(nn.Module):
    """`ChannelAttention` with the centering matrix (GSoP, section 3.1)."""

    def __init__(self, before: ChannelAttention) -> None:
        super().__init__()
        self.reduction, self.excitation = before.reduction, before.excitation

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Compute the channel weights (B, C, 1, 1)."""
        x = self.reduction(features_BCHW)
        weights: Tensor = self.excitation(covariance_of_the_paper(x.flatten(start_dim=2)))
        return weights


def grouped_convolution(before: RowConv) -> nn.Conv2d:
    """Build the grouped `nn.Conv2d` that is equal to the row-wise convolution *before*."""
    rows = before.in_channels
    conv = nn.Conv2d(rows, before.out_channels, (rows, 1), groups=rows)
    conv.load_state_dict(before.state_dict())
    return conv


def as_in_the_papers(layer: nn.Module) -> nn.Module:
    """Replace the layers of *layer* by the formulas of the papers."""
    replacements: dict[type[nn.Module], Callable[..., nn.Module]] = {
        RowConv: grouped_convolution,
        ChannelAttention: ChannelAttentionOfThePaper,
        ISqrtCov: RootOfThePaper,
    }
    parent = nn.Sequential(layer)
    for kind, build in replacements.items():
        for where, part in list(parent.named_modules()):
            if isinstance(part, kind):
                owner, _, leaf = where.rpartition(".")
                setattr(parent.get_submodule(owner), leaf, build(part))
    return parent[0].eval()


def converted(layer: nn.Module, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    """Convert *layer* to ONNX as an export does."""
    batch = Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(layer.eval(), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    names = [f"input_{number}" for number in range(len(inputs))]
    return ir.to_proto(convert(program, names, ["vector"]))


def features(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a function that creates non-negative random feature maps for a batch size."""
    return lambda batch: (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)).relu(),)


def pooling_case(width: int, side: int, target: float) -> Case:
    """Create the case of iSQRT pooling, from the covariance to the triangle."""
    make_maps = features(width, side, side)
    ours = converted(ISqrtCov(width), make_maps(2))
    other = converted(as_in_the_papers(ISqrtCov(width)), make_maps(2))
    name = f"iSQRT pooling, d={width}, M={side * side}"
    return Case(name, "paper's loop", ours, other, make_maps, (target, target))


class Routed(nn.Module):
    """16 experts and the selection of *chosen* of them, from feature maps and gate logits.

    Runs the chosen experts as an exported graph does, or with *all_experts* all of them.
    """

    def __init__(self, chosen: int, *, all_experts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chosen, self.all_experts = chosen, all_experts
        self.experts = Components(
            "sop", 256, Convolutions((256, 128)), components=16, counted=chosen, root=NewtonSchulzConfig()
        )

    def forward(self, features_BCHW: Tensor, logits_BN: Tensor) -> Tensor:
        """Compute the weighted sum of the experts' vectors."""
        weights_BN = keep_largest(logits_BN, self.chosen)
        pooled: Tensor = self.experts(features_BCHW, weights_BN, gather=not self.all_experts)
        return pooled


def routed_inputs(batch: int) -> tuple[Tensor, ...]:
    """Create 8x8 feature maps and gate logits."""
    logits = torch.randn(batch, 16, generator=torch.Generator().manual_seed(batch))
    return (*features(256, 8, 8)(batch), logits)


def mixture_case() -> Case:
    """Create the case of GM-SOP's mixture, 8 of 16 experts."""
    ours = converted(Routed(8), routed_inputs(2))
    other = converted(as_in_the_papers(Routed(8, all_experts=True)), routed_inputs(2))
    return Case("GM-SOP mixture 16-8, 8x8 maps", "paper, all 16", ours, other, routed_inputs, (2.5, 2.5))


def routed_case(chosen: int, target: float) -> Case:
    """Create the case of K of 16 experts compared with all 16."""
    ours, other = (converted(Routed(chosen, all_experts=every), routed_inputs(2)) for every in (False, True))
    return Case(f"mixture, K={chosen} of 16", "all 16", ours, other, routed_inputs, (target, target))


def gsop_case() -> Case:
    """Create the case of GSoP's channel block with 1024 channels."""
    make_maps = features(1024, 14, 14)
    torch.manual_seed(0)
    ours = converted(GSoPBlock(GSoPBlockConfig(), 1024, 1), make_maps(2))
    torch.manual_seed(0)
    other = converted(as_in_the_papers(GSoPBlock(GSoPBlockConfig(), 1024, 1)), make_maps(2))
    return Case("GSoP block, C=1024", "paper's block", ours, other, make_maps, (1.0, 1.0))


def open_graph(model: onnx.ModelProto) -> ort.InferenceSession:
    """Open *model* in ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(case: Case, batch: int, runs: int) -> tuple[Result, float]:
    """Compare the outputs of both sides, then time them at batch size *batch*; also return the target."""
    sessions = [open_graph(model) for model in (case.ours, case.other)]
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
        pooling_case(256, 14, 1 / 0.6),
        pooling_case(256, 7, 1 / 0.125),
        pooling_case(128, 8, 1 / 0.36),
        mixture_case(),
        routed_case(8, 1 / 0.52),
        routed_case(2, 1 / 0.17),
        gsop_case(),
    ]
    jobs = [(case, batch) for case in cases for batch in (1, 8)]
    with torch.no_grad():
        timed = [run(case, batch, runs) for case, batch in jobs]
    missed = [result.case for result, target in timed if result.ratio is None or 1 / result.ratio < target]
    report([result for result, _ in timed], as_json=arguments.json, met=not missed, short=missed)


if __name__ == "__main__":
    main()
