"""A rule replaces exactly the operators of its pattern, whatever a user's network computes around them.

Each network is compared outside of the exporter, on images that give larger or smaller features than those on
which the exporter compares.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.layers.mixture.components import Components, Convolutions, FusionHead
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.options import ExportOptions
from tests.export.user_network.networks import PREPROCESS, SIDE, export_small

WIDTH, CLASSES = 6, 4
LENGTH = WIDTH * (WIDTH + 1) // 2
ROOT = NewtonSchulzConfig(iterations=3)


class Textbook(nn.Module):
    """The loop of the paper, written by hand."""

    def forward(self, features: Tensor) -> Tensor:
        x = features.flatten(2)
        x = x - x.mean(dim=-1, keepdim=True)
        a = x @ x.transpose(1, 2) / x.shape[2]
        norm = a.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        identity = torch.eye(WIDTH)
        y, z = a / norm, identity.expand(x.shape[0], WIDTH, WIDTH)
        for _ in range(3):
            t = 3 * identity - z @ y
            y, z = 0.5 * y @ t, 0.5 * t @ z
        rows, columns = torch.triu_indices(WIDTH, WIDTH)
        return (y * norm.sqrt())[:, rows, columns]


class Released(nn.Module):
    """The loop in 3N - 3 products with matrices repeated for each image, on fewer positions than channels."""

    def forward(self, features: Tensor) -> Tensor:
        x = features[:, :, ::5, ::5].flatten(2)
        count, m = x.shape[0], x.shape[2]
        centering = torch.eye(m) / m - torch.ones(m, m) / m**2
        cov = x.bmm(centering.view(1, m, m).repeat(count, 1, 1)).bmm(x.transpose(1, 2))
        three = 3.0 * torch.eye(WIDTH).view(1, WIDTH, WIDTH).repeat(count, 1, 1)
        norm = (1.0 / 3.0) * cov.mul(three).sum(dim=1).sum(dim=1) + 1e-5
        a = cov.div(norm.view(count, 1, 1).expand_as(cov))
        z = 0.5 * (three - a)
        y = a.bmm(z)
        zy = 0.5 * (three - z.bmm(y))
        y, z = y.bmm(zy), zy.bmm(z)
        root = 0.5 * y.bmm(three - z.bmm(y)) * torch.sqrt(norm).view(count, 1, 1).expand_as(cov)
        rows, columns = torch.triu_indices(WIDTH, WIDTH)
        return root.flatten(1).index_select(1, rows * WIDTH + columns)


class Clamped(Textbook):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).clamp(max=0.3)


class Network(nn.Module):
    """A convolution, a root, and a classifier; subclasses add what a pattern does not contain."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 5, padding=1)  # at the borders, a constant image has other features
        self.root = root
        self.fc = nn.Linear(LENGTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.root(self.conv(images).relu()))
        return logits


class ZeroAbove(Network):
    """The classifier is not the only reader of the vector."""

    def forward(self, images: Tensor) -> Tensor:
        v = self.root(self.conv(images).relu())
        y = self.fc(v)
        return torch.where(v.amax(dim=1, keepdim=True) > 0.3, 0 * y, y)


class Experts(nn.Module):
    """Experts that a gate weighs; the gate leaves 2 of 8 weights other than 0, or those above a threshold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.gate = nn.Linear(WIDTH, 8)
        self.experts = Components("sop", WIDTH, Convolutions((5, 4)), components=8, counted=2, root=ROOT)
        self.fc = FusionHead(10, CLASSES, norm=True, dropout=0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu()
        gate = self.gate(x.mean((2, 3)))
        above_threshold = gate.softmax(dim=1) * (gate > 0)
        weights = keep_largest(gate, 2) if self.kind == "rank" else above_threshold
        logits: Tensor = self.fc(self.experts(x, weights))
        return logits


class Root(nn.Module):
    """A loop on fewer positions than channels (*inner*) or more; subclasses write a part of it otherwise.

    *hidden* (B, 1, 1) is 0 for all images of the exporter, about 2 for a red image and -3 for a blue one.
    """

    identity: Tensor

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.step = 5 if inner else 1
        self.fc, self.scale = nn.Linear(LENGTH, 1), nn.Parameter(torch.rand(WIDTH, 1) + 0.5)
        self.register_buffer("identity", torch.eye(WIDTH))

    def forward(self, features: Tensor, hidden: Tensor) -> Tensor:
        x = self.start(features[:, :, :: self.step, :: self.step].flatten(2) * self.scale, hidden)
        a = x @ x.transpose(1, 2)
        norm = self.trace(a)
        y, z = self.normalized(a, norm, hidden), self.identity
        for _ in range(3):
            t = 1.5 * self.identity - 0.5 * z @ y
            y, z = y @ t, t @ z
        root = self.result(y, norm, hidden)
        rows, columns = torch.triu_indices(WIDTH, WIDTH)
        logit: Tensor = self.fc(root[:, rows, columns])
        return logit

    def start(self, x: Tensor, _hidden: Tensor) -> Tensor:
        return x

    def trace(self, a: Tensor) -> Tensor:
        return (a * self.identity).sum((1, 2), keepdim=True)

    def normalized(self, a: Tensor, norm: Tensor, _hidden: Tensor) -> Tensor:
        return a / norm

    def result(self, y: Tensor, norm: Tensor, _hidden: Tensor) -> Tensor:
        return y * norm.sqrt()


class Hidden(Root):
    """Twice as many matrices as images; the logits of usual images do not show their sum."""

    def result(self, y: Tensor, norm: Tensor, hidden: Tensor) -> Tensor:
        return self.identity + hidden.relu() * y.sum(0)


class TwoMatrices(Hidden):
    def normalized(self, a: Tensor, norm: Tensor, hidden: Tensor) -> Tensor:
        return (a / norm).repeat(2, 1, 1)


class FourAxes(Hidden):
    def normalized(self, a: Tensor, norm: Tensor, hidden: Tensor) -> Tensor:
        return (a / norm).expand(2, a.shape[0], WIDTH, WIDTH)


class TiledTrace(Hidden):
    def trace(self, a: Tensor) -> Tensor:
        return (a * self.identity).repeat(2, 1, 1).sum((1, 2), keepdim=True)

    def normalized(self, a: Tensor, norm: Tensor, hidden: Tensor) -> Tensor:
        return a.repeat(2, 1, 1) / norm


class DividedOut(Root):
    def normalized(self, a: Tensor, norm: Tensor, hidden: Tensor) -> Tensor:
        g = (45 * hidden).exp()
        return a * g / g / norm


class Subtracted(Root):
    def normalized(self, a: Tensor, norm: Tensor, hidden: Tensor) -> Tensor:
        g = (45 * hidden).exp()
        return (a + g * self.identity - g * self.identity) / norm


class SubnormalTrace(Root):
    def start(self, x: Tensor, hidden: Tensor) -> Tensor:
        return x * (24 * hidden.clamp(max=0)).exp()


class SumOfSums(Root):
    def trace(self, a: Tensor) -> Tensor:
        return (a * self.identity).sum(-1).sum(-1, keepdim=True)[..., None]


class OneAxisAfterTheOther(Root):
    def trace(self, a: Tensor) -> Tensor:
        return (a * self.identity).sum(-1, keepdim=True).sum(-2, keepdim=True)


class Diagonal(Root):
    def trace(self, a: Tensor) -> Tensor:
        return torch.diagonal(a, dim1=-2, dim2=-1).sum(-1, keepdim=True).unsqueeze(-1)


class DiagonalWithAnAxis(Root):
    def trace(self, a: Tensor) -> Tensor:
        return a.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)[..., None]


class Roots(nn.Module):
    """The mean of the features, and a logit for each of *roots*; some are equal for all probe images."""

    def __init__(self, *roots: Root) -> None:
        super().__init__()
        self.conv, self.roots = nn.Conv2d(3, WIDTH, 3), nn.ModuleList(roots)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images).relu()
        extra = (images[:, 0] - images[:, 2]).mean((1, 2)).view(-1, 1, 1)
        hidden = (extra - 2).relu() - (-2 - extra).relu()
        return torch.cat(
            [features.mean((1, 2, 3))[:, None], *(root(features, hidden) for root in self.roots)], 1
        )


ROOTS, ROUTED = "Newton-Schulz in 3N-3 products", "K of N experts"
# the network, and which of the two rules applies
CASES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "a root whose subclass clamps": (lambda: Network(Clamped()), {ROOTS}),
    "another reader in plain code": (lambda: ZeroAbove(Textbook()), {ROOTS}),
    "a threshold gate": (lambda: Experts("threshold"), set()),
    "a gate of ranks": (lambda: Experts("rank"), {ROUTED}),
    "the loop of the paper": (lambda: Network(Textbook()), {ROOTS}),
    "the loop with repeated matrices": (lambda: Network(Released()), {ROOTS}),
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    network = CASES[case][0]()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.get_buffer("running_mean"), std=0.2)
    return network.eval()


FAST = {"a root whose subclass clamps", "a threshold gate", "the loop of the paper"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES])
def test_the_file_computes_what_the_network_computes(case: str, tmp_path: Path) -> None:
    network = build(case)
    exported = export_small(network, tmp_path, options=ExportOptions(max_batch=4))
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    images[2] = images[2] // 64
    images[3, ::2] = 255
    with torch.no_grad():
        expected = network(Normalize(PREPROCESS)(torch.from_numpy(images))).numpy()
    session = ort.InferenceSession(exported.path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        found = session.run(None, {"images": images[:batch]})[0]
        np.testing.assert_allclose(found, expected[:batch], rtol=1e-4, atol=1e-5)
    assert set(exported.lowering.summary) & {ROOTS, ROUTED} == CASES[case][1]


def colors() -> NDArray[np.uint8]:
    """Generate images (N, 12, 12, 3): for `DividedOut`, g is 1, infinite, 1e9, 0, 1e-39 and between."""
    images = np.zeros((8, SIDE, SIDE, 3), np.uint8)
    images[:2] = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    for image, (channel, value) in zip(
        images[2:], ((0, 255), (0, 162), (2, 255), (2, 211), (0, 140), (2, 150)), strict=True
    ):
        image[..., channel] = value
    return images


HIDDEN = (TwoMatrices, FourAxes, TiledTrace)
CANCELLED = (DividedOut, Subtracted, SubnormalTrace)
TRACES = (SumOfSums, Diagonal, DiagonalWithAnAxis)


def check_roots(kinds: Sequence[tuple[type[Root], bool]], path: Path, batches: Sequence[int]) -> None:
    """Compare the file of a network with a logit for each of *kinds* with the network."""
    torch.manual_seed(0)
    network = Roots(*(kind(inner) for kind, inner in kinds)).eval()
    nn.init.uniform_(network.conv.get_parameter("bias"), 0.1, 0.5)
    labels, options = [f"{i}" for i in range(len(kinds) + 1)], ExportOptions(max_batch=max(batches))
    exported = export_small(network, path, plain=None, labels=labels, options=options)
    session = ort.InferenceSession(exported.path / "model.onnx", providers=["CPUExecutionProvider"])
    images = colors()
    for batch in batches:
        for start in range(0, len(images) - batch + 1, batch):
            given = images[start : start + batch]
            with torch.no_grad():
                expected = network(Normalize(PREPROCESS)(torch.from_numpy(given)).contiguous()).numpy()
            found = session.run(None, {"images": given})[0]
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)


def test_what_no_image_of_the_exporter_reaches_is_computed_as_it_is_written(tmp_path: Path) -> None:
    check_roots(
        [(kind, kind in {TiledTrace, SubnormalTrace}) for kind in (*HIDDEN, *CANCELLED)], tmp_path, [1]
    )


def test_every_spelling_of_a_trace_is_exported(tmp_path: Path) -> None:
    check_roots([(kind, True) for kind in TRACES], tmp_path, [1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*HIDDEN, *CANCELLED, *TRACES, OneAxisAfterTheOther])
def test_a_root_is_computed_as_it_is_written(kind: type[Root], tmp_path: Path) -> None:
    sizes = [1] if kind in HIDDEN else [1, 2, 3]
    check_roots([(kind, False), (kind, True)], tmp_path, sizes)
