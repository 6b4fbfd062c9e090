"""Latency of exported layers in ONNX Runtime on one core.

A mixture that runs the K of 16 experts that an image needs is compared with all 16, and iSQRT
pooling with the loop of its paper. Both forms are exported, their outputs are compared, and
they are timed alternately at batch size 1 and 8. `met` is true if each ratio reaches its
target. The others have no target, because DSoP's paper prints them: the time of ResNet-50 with
second-order pooling of 64 channels, for the strides of conv5_x with and without it, and of
training with DSoP.

    python benchmarks/lowering.py [--quick] [--json]
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from measure import Result, compare, parse, report
from torch import Tensor, nn
from torch.export import Dim

from sopdeploy import create_model
from sopdeploy.layers.covariance import covariance_trace
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, ISqrtCov, NewtonSchulzConfig
from sopdeploy.layers.mixture import Components, softmax_of_largest
from sopdeploy.models.base import Classifier
from sopdeploy.training.loop.losses import training_loss
from sopdeploy_export.lower.to_onnx import to_ir

TOLERANCE = 2e-5  # relative to the largest value; both sides are float32
EXPERTS = {8: 0.52, 2: 0.17}  # largest share of the time of all 16, by K
POOLING = {
    (256, 14): 0.6,
    (256, 7): 0.125,
    (128, 8): 0.36,
}  # of the paper's form, by channels and side


class Case(NamedTuple):
    """Two equivalent layers, their inputs by batch size, and the largest share of the second one's time."""

    name: str
    against: str
    layers: tuple[nn.Module, nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    share: float


class RootOfThePaper(ISqrtCov):
    """`ISqrtCov`, computed with the centering matrix and the loop of the paper (iSQRT-COV, Eq. 4)."""

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute the upper triangle (B, d (d + 1) / 2), row by row."""
        x_BdM = features_BdHW.flatten(start_dim=2)
        m = x_BdM.shape[2]
        cov_Bdd = x_BdM @ (torch.eye(m) / m - torch.ones(m, m) / m**2) @ x_BdM.transpose(1, 2)
        norm = covariance_trace(cov_Bdd).clamp_min(SMALLEST_NORM)
        identity = torch.eye(cov_Bdd.shape[1])
        y, z = cov_Bdd / norm, identity.expand_as(cov_Bdd)
        for _ in range(self.config.iterations):
            t = 0.5 * (3.0 * identity - z @ y)
            y, z = y @ t, t @ z
        return (y * norm.sqrt()).flatten(start_dim=1).index_select(1, self.triangle)


class Routed(nn.Module):
    """16 experts and the selection of *chosen* of them, from feature maps and gate logits.

    Runs the chosen experts as an exported graph does, or with *all_experts* all of them.
    """

    def __init__(self, chosen: int, *, all_experts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chosen, self.all_experts = chosen, all_experts
        self.experts = Components(
            "sop", 256, (256, 128), components=16, evaluated=chosen, root=NewtonSchulzConfig()
        )

    def forward(self, features_BCHW: Tensor, logits_BN: Tensor) -> Tensor:
        """Compute the weighted sum of the experts' vectors."""
        weights_BN = softmax_of_largest(logits_BN, self.chosen)
        pooled: Tensor = self.experts(features_BCHW, weights_BN, gather=not self.all_experts)
        return pooled


def routed_inputs(batch: int) -> tuple[Tensor, ...]:
    """Create 8x8 feature maps and gate logits."""
    logits = torch.randn(batch, 16, generator=torch.Generator().manual_seed(batch))
    return (*pooled_inputs(256, 8, batch), logits)


def pooled_inputs(channels: int, side: int, batch: int) -> tuple[Tensor, ...]:
    """Create non-negative feature maps."""
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, channels, side, side, generator=generator).relu(),)


def session_of(layer: nn.Module, inputs: tuple[Tensor, ...]) -> ort.InferenceSession:
    """Convert *layer* to ONNX as an export does, and open it in ONNX Runtime on one thread."""
    shapes, names = (
        ({0: Dim("batch", min=1)},) * len(inputs),
        ["features", "logits"][: len(inputs)],
    )
    with torch.no_grad():
        program = torch.export.export(layer.eval(), inputs, dynamic_shapes=shapes)
    model = ir.to_proto(to_ir(program, names, ["vector"]))
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def compare_forms(case: Case, runs: int) -> list[Result]:
    """Compare the outputs of both layers, then time them at both batch sizes."""
    sessions = [session_of(layer, case.inputs(2)) for layer in case.layers]
    results = []
    for batch in (1, 8):
        given = {
            name: x.numpy()
            for name, x in zip(("features", "logits"), case.inputs(batch), strict=False)
        }
        sides = [lambda one=one, given=given: one.run(None, given)[0] for one in sessions]
        ours, other = sides[0](), sides[1]()
        name = f"{case.name}, batch {batch}"
        if np.abs(ours - other).max() > TOLERANCE * np.abs(other).max():
            sys.exit(f"{name}: the outputs of both sides differ")
        results.append(
            compare(name, case.against, *sides, runs=runs, warmups=3, clock=process_time)
        )
    return results


def printed_costs(runs: int) -> Iterator[Result]:
    """Time what DSoP's paper prints as 24 % more for inference and more than twice for training."""
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    networks: dict[str, dict[str, Any]] = {
        "isqrt-resnet50": {"pooling": {"kind": "isqrt", "width": 64}},
        "resnet50": {},
    }
    sides = {
        (name, stride): partial(
            session_of(create_model(name, conv5_stride=stride, **options), (images,)).run,
            None,
            {"features": images.numpy()},
        )
        for name, options in networks.items()
        for stride in (1, 2)
    }
    for stride, other in ((1, 2), (1, 1), (2, 2)):  # the first are the defaults of the catalog
        name, against = (
            f"iSQRT-ResNet-50 of 64 channels, stride {stride}",
            f"ResNet-50, stride {other}",
        )
        timed = sides["isqrt-resnet50", stride], sides["resnet50", other]
        yield compare(name, against, *timed, runs=runs, clock=process_time)
    trained = create_model("dsop-resnet18"), create_model("resnet18")
    steps = [partial(train_step, network, images) for network in trained]
    name = "training of ResNet-18, DSoP"
    yield compare(name, "without branches", *steps, runs=runs // 4, clock=process_time)


def train_step(network: Classifier, images: Tensor) -> None:
    """Compute the gradients of *network* for *images*."""
    network.train()
    labels = torch.zeros(len(images), dtype=torch.int64)
    torch.autograd.backward(
        training_loss(network(images), labels, network.loss_weights(), 0.0).total
    )


def main() -> None:
    """Time all cases; list those that miss their target."""
    arguments = parse(__doc__)
    torch.set_num_threads(1)
    runs = 11 if arguments.quick else 41
    results: list[Result] = []
    missed: list[str] = []
    cases = [
        Case(
            f"mixture, K={k}",
            "all 16",
            (Routed(k), Routed(k, all_experts=True)),
            routed_inputs,
            share,
        )
        for k, share in EXPERTS.items()
    ]
    for (d, side), share in POOLING.items():
        layers, name = (
            (ISqrtCov(d), RootOfThePaper(d)),
            f"iSQRT pooling, d={d}, M={side * side}",
        )
        cases.append(Case(name, "paper's loop", layers, partial(pooled_inputs, d, side), share))
    for case in cases:
        timed = compare_forms(case, runs)
        missed += [one.case for one in timed if one.ratio is None or one.ratio > case.share]
        results += timed
    results += printed_costs(runs)
    report(results, as_json=arguments.json, met=not missed, short=missed)


if __name__ == "__main__":
    main()
