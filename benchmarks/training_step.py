"""Training steps: iSQRT-COV compared with the paper's loop, DSoP compared with the plain network.

    python benchmarks/training_step.py [--quick] [--json]

iSQRT-COV (forward and backward) is compared with the loop in the paper, differentiated by autograd. One step
of DSoP-ResNet-50 (224-pixel images, forward and backward) is compared with one step of the plain ResNet-50,
with and without the optimizer's update. Two variants of DSoP are measured: `table` corresponds to the paper's
Table I, whose GFLOPs have a ratio of 2.15 (13.45 / 6.27), and `text` to its text, with branches without
down-sampling. Times are CPU times of one thread.
"""

from collections.abc import Callable
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from measure import Result, compare, make_parser, report
from torch import Tensor, nn

from sopdeploy import create_model
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.models.base import TrainingOutput

POOLINGS = (
    (256, 196),
    (256, 49),
    (128, 64),
    (256, 784),
    (64, 3136),
    (128, 196),
    (16, 1024),
)  # channels, positions


class PaperISqrtCov(nn.Module):
    """iSQRT-COV as in the paper: all matrix products in the channel domain, differentiated by autograd."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rows, self.columns = torch.triu_indices(channels, channels)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        x = features_BdHW.flatten(2)
        x = x - x.mean(dim=2, keepdim=True)
        cov = x @ x.transpose(1, 2) / x.shape[2]
        trace = cov.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        identity = torch.eye(cov.shape[1]).expand_as(cov)
        y, z = cov / trace, identity
        for _ in range(5):
            step = 0.5 * (3.0 * identity - z @ y)
            y, z = y @ step, step @ z
        return (y * trace.sqrt())[:, self.rows, self.columns]


def forward_backward(layer: nn.Module, features: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs one forward and backward pass of *layer*."""
    return lambda: torch.autograd.grad(layer(features), features, grad)[0]


def pooling_result(channels: int, positions: int, batch: int, runs: int) -> Result:
    """Compare the time of a forward and backward pass of one pooling."""
    torch.manual_seed(0)
    layer = ISqrtCov(channels)
    features = torch.randn(batch, channels, positions, 1).relu().requires_grad_()
    grad = torch.randn(batch, layer.out_features)
    ours = forward_backward(layer, features, grad)
    other = forward_backward(PaperISqrtCov(channels), features, grad)
    torch.testing.assert_close(ours(), other(), rtol=1e-3, atol=1e-4)
    case = f"iSQRT-COV d={channels} M={positions} batch {batch}"
    return compare(case, "paper's loop", ours, other, runs=runs, warmups=2, clock=process_time)


def training_step(name: str, batch: int, *, update: bool, **config: Any) -> Callable[[], None]:
    """Return a function that runs one training step of the network *name*."""
    network = create_model(name, num_classes=1000, conv5_stride=1, **config)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch)

    def step() -> None:
        output = network(images)
        heads = [output.logits, *output.branches.values()] if isinstance(output, TrainingOutput) else [output]
        optimizer.zero_grad(set_to_none=not update)
        torch.autograd.backward([F.cross_entropy(head, labels) for head in heads])
        if update:
            optimizer.step()

    return step


def step_result(aux_stride: str, batch: int, runs: int, *, update: bool) -> Result:
    """Compare the time of a DSoP step with a plain one."""
    ours = training_step("dsop-resnet50", batch, update=update, aux_stride=aux_stride)
    other = training_step("resnet50", batch, update=update)
    case = f"DSoP-ResNet-50 ({aux_stride}) step batch {batch}, {'with' if update else 'without'} update"
    return compare(case, "plain ResNet-50 step", ours, other, runs=runs, clock=process_time)


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and runs, within a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    poolings, runs = (POOLINGS[:3], 9) if arguments.quick else (POOLINGS, 25)
    results = [pooling_result(channels, positions, batch=8, runs=runs) for channels, positions in poolings]
    batch, runs = (2, 3) if arguments.quick else (16, 5)
    results += [
        step_result(aux_stride, batch, runs, update=update)
        for aux_stride in ("table", "text")
        for update in ((False,) if arguments.quick else (False, True))
    ]
    report(results, as_json=arguments.json, threads=1)


if __name__ == "__main__":
    main()
