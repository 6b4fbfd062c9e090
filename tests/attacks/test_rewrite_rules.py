"""A rule replaces exactly the operators of its pattern, whatever a user's network computes around them.

Each network is compared outside of the exporter, on images that give larger or smaller features than those on
which the exporter compares.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import Components, Convolutions, FusionHead, make_components
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.user_network.export_network import export_network

SIDE, WIDTH, CLASSES = 12, 6, 4
LENGTH = WIDTH * (WIDTH + 1) // 2
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE)
ROOT = NewtonSchulzConfig(iterations=3)
OPTIONS = ExportOptions(max_batch=4)


class Network(nn.Module):
    """A convolution, a root, and a classifier; subclasses add what a pattern does not contain."""

    def __init__(self, root: nn.Module | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.root = root or ISqrtCov(WIDTH, ROOT)
        self.fc = head or nn.Linear(LENGTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.root(self.conv(images).relu()))
        return logits


class ClampedRoot(ISqrtCov):
    def forward(self, features_BdHW: Tensor) -> Tensor:
        return super().forward(features_BdHW).clamp(max=0.3)


class ClampedHead(FusionHead):
    def forward(self, pooled_BD: Tensor) -> Tensor:
        return super().forward(pooled_BD).clamp(max=0.02)


class EqualRoot(ISqrtCov):
    """A subclass that adds nothing."""


class ZeroAbove(Network):
    """The classifier is not the only reader of the vector."""

    def forward(self, images: Tensor) -> Tensor:
        v = self.root(self.conv(images).relu())
        y = self.fc(v)
        return torch.where(v.amax(dim=1, keepdim=True) > 0.3, 0 * y, y)


class SecondReader(Network):
    def forward(self, images: Tensor) -> Tensor:
        v = self.root(self.conv(images).relu())
        return self.fc(v) + v[:, :CLASSES]


class Experts(nn.Module):
    """Experts that a gate weighs; the gate leaves 2 of 8 weights other than 0, or those above a threshold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.gate = nn.Linear(WIDTH, 8)
        self.experts: Components = make_components(
            "sop", WIDTH, Convolutions((5, 4)), components=8, counted=2, root=ROOT
        )[0]
        self.fc = FusionHead(10, CLASSES, norm=True, dropout=0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu()
        logits = self.gate(x.mean((2, 3)))
        if self.kind == "rank":
            weights = keep_largest(logits, 2)
        elif self.kind == "threshold":
            weights = logits.softmax(dim=1) * (logits > 3)
        else:
            kept, index = logits.topk(2, dim=1)
            weights = torch.zeros_like(logits).scatter(1, index, kept.softmax(dim=1))
        return self.fc(self.experts(x, weights))


class Textbook(nn.Module):
    """The loop of the paper, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.fc = nn.Linear(LENGTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu().flatten(2)
        x = x - x.mean(dim=-1, keepdim=True)
        a = x @ x.transpose(1, 2) / x.shape[2]
        norm = a.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        identity = torch.eye(WIDTH)
        y, z = a / norm, identity.expand(images.shape[0], WIDTH, WIDTH)
        for _ in range(3):
            t = 3 * identity - z @ y
            y, z = 0.5 * y @ t, 0.5 * t @ z
        rows, columns = torch.triu_indices(WIDTH, WIDTH)
        logits: Tensor = self.fc((y * norm.sqrt())[:, rows, columns])
        return logits


def channels_last() -> nn.Module:
    return Network().to(memory_format=torch.channels_last)


def tied() -> nn.Module:
    class Twice(Network):
        def forward(self, images: Tensor) -> Tensor:
            x = self.conv(images).relu()
            return self.fc(self.root(x)) + self.fc(self.root(-x))

    return Twice()


SCALE, ROOTS, ROUTED = (
    "post-compensation after the linear layer",
    "Newton-Schulz in 3N-3 products",
    "K of N experts",
)
NORM = "fusion batch norm folded into the classifier"
# the network, the rules that must apply, and those that must not
CASES: dict[str, tuple[Callable[[], nn.Module], set[str], set[str]]] = {
    "a root whose subclass clamps": (lambda: Network(ClampedRoot(WIDTH, ROOT)), {ROOTS}, {SCALE}),
    "a head whose subclass clamps": (
        lambda: Network(head=ClampedHead(LENGTH, CLASSES, norm=True, dropout=0.0)),
        {ROOTS, NORM},
        set(),
    ),
    "another reader in plain code": (ZeroAbove, {ROOTS}, {SCALE}),
    "a valid second reader": (SecondReader, {ROOTS}, {SCALE}),
    "a threshold gate": (lambda: Experts("threshold"), {ROOTS, NORM}, {ROUTED}),
    "a gate of ranks": (lambda: Experts("rank"), {ROOTS, NORM, ROUTED}, set()),
    "a gate of TopK and Scatter": (lambda: Experts("topk"), {ROOTS, NORM, ROUTED}, set()),
    "a subclass that adds nothing": (lambda: Network(EqualRoot(WIDTH, ROOT)), {ROOTS, SCALE}, set()),
    "the loop of the paper by hand": (Textbook, {ROOTS, SCALE}, set()),
    "channels last": (channels_last, {ROOTS, SCALE}, set()),
    "one classifier for two roots": (tied, {ROOTS, SCALE}, set()),
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    network = CASES[case][0]()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.running_mean, std=0.2)
    return network.eval()


SLOW = CASES.keys() - {
    "a root whose subclass clamps",
    "another reader in plain code",
    "a threshold gate",
    "the loop of the paper by hand",
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def test_the_file_computes_what_the_network_computes(case: str, tmp_path: Path) -> None:
    network = build(case)
    exported = export_network(
        network,
        plain=None,
        labels=list("abcd"),
        preprocess=PREPROCESS,
        destination=tmp_path,
        name="n",
        options=OPTIONS,
    )
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
    applied, (_, wanted, refused) = set(exported.lowering.summary), CASES[case]
    assert wanted <= applied
    assert not refused & applied
