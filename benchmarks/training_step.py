"""Training steps: iSQRT-COV compared with the paper's loop, DSoP compared with the plain network.

    python benchmarks/training_step.py [--quick] [--device cuda] [--json]

iSQRT-COV (forward and backward) is compared with the loop in the paper, differentiated by autograd: CPU time
and peak memory. One step of DSoP-ResNet-50 (224-pixel images, forward and backward) is compared with one step
of the plain ResNet-50, with and without the optimizer's update. Two variants of DSoP are measured: `table`
corresponds to the paper's Table I, whose GFLOPs have a ratio of 2.15 (13.45 / 6.27), and `text` to its text,
with branches without down-sampling.

The second-order layers of the slides on iSQRT-COV are compared on AlexNet's last map (256 channels, 13 x 13
positions): Newton-Schulz, eigenvalues (EIG) and singular values (SVD), forward and backward (FP+BP), backward
alone (BP), and peak memory; so are SVD and EIG of one covariance of this size. These layers run on --device.

Everything on the CPU is CPU time of one thread.
"""

from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from measure import Result, compare, make_parser, report
from meta_layers import CHANNELS, SIDE, MetaLayer, peak_mebibytes
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
BASELINE = "iSQRT-COV (N=5)"
META_LAYERS: dict[str, dict[str, Any]] = {  # the slides' table
    "iSQRT-COV (N=3)": {"kind": "isqrt", "iterations": 3},
    BASELINE: {"kind": "isqrt", "iterations": 5},
    "MPN-COV, EIG": {"kind": "mpncov"},
    "Impro. B-CNN, SVD": {"kind": "improved-bcnn", "svd": True},
    "Impro. B-CNN, Newton-Schulz (N=5)": {"kind": "improved-bcnn", "root": "newton-schulz"},
    "G2DeNet, SVD": {"kind": "g2denet", "svd": True},
}


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


def pooling_results(channels: int, positions: int, batch: int, runs: int) -> list[Result]:
    """Measure time and peak memory of a forward and backward pass of one pooling."""
    torch.manual_seed(0)
    layer = ISqrtCov(channels)
    features = torch.randn(batch, channels, positions, 1).relu().requires_grad_()
    grad = torch.randn(batch, layer.out_features)
    ours = forward_backward(layer, features, grad)
    other = forward_backward(PaperISqrtCov(channels), features, grad)
    torch.testing.assert_close(ours(), other(), rtol=1e-3, atol=1e-4)
    case = f"iSQRT-COV d={channels} M={positions} batch {batch}"
    memory = Result(
        case=f"{case}, peak memory",
        against="paper's loop",
        ours=peak_mebibytes(ours),
        other=peak_mebibytes(other),
        unit="MiB",
        runs=1,
    )
    return [compare(case, "paper's loop", ours, other, runs=runs, warmups=2, clock=process_time), memory]


def compare_on(
    device: str,
    case: str,
    against: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    runs: int,
) -> Result:
    """Compare CPU times, or on a GPU the times until it has finished."""
    if device == "cpu":
        return compare(case, against, ours, other, runs=runs, clock=process_time)

    def waiting(call: Callable[[], object]) -> Callable[[], None]:
        def call_and_wait() -> None:
            call()
            torch.cuda.synchronize()

        return call_and_wait

    return compare(case, against, waiting(ours), waiting(other), runs=runs, clock=perf_counter)


def meta_layer_results(names: list[str], batch: int, runs: int, device: str = "cpu") -> list[Result]:
    """Measure FP+BP, BP and peak memory of the layers *names* for *batch* images of AlexNet."""
    baseline, results = MetaLayer(META_LAYERS[BASELINE], batch, device), []
    for name in names:
        layer = MetaLayer(META_LAYERS[name], batch, device)
        case = f"{name}, batch {batch}"
        for part in ("both", "backward"):
            pair = getattr(layer, part), getattr(baseline, part)
            shown = f"{case}, {'FP+BP' if part == 'both' else 'BP'}"
            results.append(compare_on(device, shown, BASELINE, *pair, runs=runs))
        results.append(
            Result(
                case=f"{case}, peak memory",
                against=BASELINE,
                ours=peak_mebibytes(layer.both),
                other=peak_mebibytes(baseline.both),
                unit="MiB",
                runs=1,
            )
        )
    return results


def decomposition_result(runs: int, device: str) -> Result:
    """Compare SVD with EIG of one covariance of AlexNet's last feature map."""
    torch.manual_seed(0)
    covariance = torch.randn(CHANNELS, SIDE * SIDE).relu().cov(correction=0).to(device)
    svd, eig = (lambda: torch.linalg.svd(covariance)), (lambda: torch.linalg.eigh(covariance))
    return compare_on(device, f"SVD of a {CHANNELS} x {CHANNELS} covariance", "EIG", svd, eig, runs=runs)


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
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device of the slides' layers"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for channels, positions in POOLINGS[:3] if arguments.quick else POOLINGS:
        results += pooling_results(channels, positions, batch=8, runs=9 if arguments.quick else 25)
    layer_runs = 9 if arguments.quick else 25
    results += meta_layer_results(list(META_LAYERS), 8, layer_runs, arguments.device)
    results.append(decomposition_result(layer_runs, arguments.device))
    batch, runs = (2, 3) if arguments.quick else (16, 5)
    for aux_stride in ("table", "text"):
        for update in (False,) if arguments.quick else (False, True):
            results.append(step_result(aux_stride, batch, runs, update=update))
    report(results, as_json=arguments.json, threads=1)


if __name__ == "__main__":
    main()
