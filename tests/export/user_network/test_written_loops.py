"""Square roots and mixtures that users write by hand are exported as they are written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from sopdeploy.layers.mixture.components import Components, Convolutions
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.options import ExportOptions
from tests.export.user_network.networks import CLASSES, PREPROCESS, SIDE, export_small

WIDTH = 6


class Textbook(nn.Module):
    """The loop of the paper; *trace* computes the trace (B,) of matrices."""

    def __init__(self, trace: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.trace = trace

    def forward(self, features: Tensor) -> Tensor:
        x = features.flatten(2)
        x = x - x.mean(dim=-1, keepdim=True)
        a = x @ x.transpose(1, 2) / x.shape[2]
        norm = self.trace(a)[:, None, None] + 1e-5  # an image of one color has a covariance of 0
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


class Experts(nn.Module):
    """Eight components whose weights (B, 8) *gate* computes from logits, also more than two of them."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.logits = gate, nn.Linear(WIDTH, 8)
        root = NewtonSchulzConfig(iterations=3)
        self.experts = Components("sop", WIDTH, Convolutions((5, 6)), components=8, counted=2, root=root)

    def forward(self, features: Tensor) -> Tensor:
        weights = self.gate(self.logits(features.mean((2, 3))))
        pooled: Tensor = self.experts(features, weights)
        return pooled


LOOPS: dict[str, Callable[[], nn.Module]] = {
    "a trace by the diagonal": lambda: Textbook(lambda a: torch.diagonal(a, dim1=-2, dim2=-1).sum(-1)),
    "a trace by a product": lambda: Textbook(lambda a: (a * torch.eye(WIDTH)).sum((1, 2))),
    "matrices repeated for each image": Released,
    "a gate of ranks": lambda: Experts(lambda logits: keep_largest(logits, 2)),
    "a threshold gate": lambda: Experts(lambda logits: logits.softmax(1) * (logits > 0)),
}


@pytest.mark.parametrize("case", LOOPS)
def test_the_file_computes_what_the_network_computes_on_other_images_than_the_probes(
    case: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    classifier = nn.Linear(WIDTH * (WIDTH + 1) // 2, CLASSES)
    network = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), LOOPS[case](), classifier).eval()
    exported = export_small(network, tmp_path, options=ExportOptions(max_batch=4))
    images = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    images[2] = images[2] // 64
    images[3, ::2] = 255
    with torch.no_grad():
        expected = network(Normalize(PREPROCESS)(torch.from_numpy(images))).numpy()
    session = ort.InferenceSession(exported.path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        found = session.run(None, {"images": images[:batch]})[0]
        np.testing.assert_allclose(found, expected[:batch], rtol=1e-4, atol=1e-5)
